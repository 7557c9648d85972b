"""Files and folders: written aside and renamed, hashed while written, compared with a record later; and the disk.

Every room may import this file: it imports none.

SHA-256 everywhere: with the processor's instructions for it OpenSSL hashes 1.4 GB/s on one core of a small server,
against 0.6 GB/s of BLAKE2b; CRC-32 is quicker (3.7 GB/s), but anybody can make another file with the same one.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Buffer, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUFFER_BYTES = 1 << 20
REMEDIES = {
    errno.ENOSPC: "free space there, or take a larger disk",
    errno.EDQUOT: "free space there, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f, or the file system's own limit)",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EROFS: "mount the disk writable, or move the run to another",
}


class DiskSpaceError(ValueError):
    """The disk a folder would lie on cannot hold it."""


def first_few(items: Sequence[str], limit: int = 4, what: str = "more") -> list[str]:
    """Return the first `limit` of `items`, and one more text that counts the others."""
    return [*items[:limit], *([f"and {len(items) - limit} {what}"] if len(items) > limit else [])]


def nearest_existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next((existing for existing in (path, *path.parents) if existing.exists()), Path())


def check_free_space(target: Path, num_bytes: int, what: str) -> None:
    """Raise DiskSpaceError unless the disk of `target`, which need not exist yet, has `num_bytes` free.

    Nothing is created. `what` names what will be written, for the message.
    """
    existing = nearest_existing(target.absolute())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise DiskSpaceError(
            f"not enough disk for {what} in {target}: {num_bytes / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB free on "
            f"the disk of {existing}; free {(num_bytes - free) / 1e9:,.2f} GB or write to another disk"
        )


@contextmanager
def written_aside(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a path beside `target` to write a file or a folder at; it becomes `target` when the block ends well.

    What stands at `target` is replaced as a whole, an old folder being removed last; without `replace` only an absent
    one or an empty folder is, also when something appeared there in the meantime. After an error nothing is left, after
    a kill `.<name>.partial-*`, which nothing reads. Raises OSError.
    """
    target = target.resolve()  # a link to a folder on another disk stays a link
    token = uuid.uuid4().hex[:12]
    aside, old = (target.with_name(f".{target.name}.{word}-{token}") for word in ("partial", "replaced"))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        for path in [*(sorted(aside.iterdir()) if aside.is_dir() else ()), aside]:
            flush_to_disk(path)
        if replace and target.is_dir():
            target.rename(old)
        if not replace and target.is_file():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        aside.rename(target)
        flush_to_disk(target.parent)
    except BaseException:
        remove(aside)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds; says nothing of one that is not there or does not go."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write JSON, so that a reader never sees half a file."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Read all of a file and return its checksum; raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_problems(
    folder: Path, sizes: Mapping[str, int], content_problem: Callable[[str, Path], str | None]
) -> list[str]:
    """Say what is wrong with the files of `folder`, each by name: missing, of another size, or what `content_problem`
    finds in a file of the right size.

    A file that cannot be read is a problem like any other.
    """
    problems = []
    for name, size_bytes in sizes.items():
        path = folder / name
        try:
            if not path.is_file():
                problem: str | None = "is no regular file" if path.exists() else "is missing"
            elif (found := path.stat().st_size) != size_bytes:
                problem = f"has {found:,} bytes, the manifest says {size_bytes:,}"
            else:
                problem = content_problem(name, path)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem is not None:
            problems.append(f"{name} {problem}")
    return problems


class HashingFile(io.BufferedWriter):
    """A new file that hashes what is written to it.

    A failed write is kept in `failure` and later ones go nowhere: torch writes tensors from C++, where an exception of
    ours would be replaced by one that no longer says what happened. `hashed_file` raises it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._digest = path, hashlib.sha256()
        self.failure: OSError | None = None
        super().__init__(io.FileIO(path, "wb"), BUFFER_BYTES)

    def write(self, data: Buffer, /) -> int:
        """Write and hash `data`; returns its number of bytes, also after a failure."""
        if self.failure is None:
            try:
                super().write(data)
                self._digest.update(data)
            except OSError as error:
                error.filename = str(self._path)
                self.failure = error
        return memoryview(data).nbytes

    def sha256(self) -> str:
        """Return the checksum of everything written so far."""
        return self._digest.hexdigest()


@contextmanager
def hashed_file(path: Path) -> Iterator[HashingFile]:
    """Create `path` for writing; at the end of the block it is on the disk. Raises the OSError of a failed write."""
    stream = HashingFile(path)
    try:
        yield stream
        if stream.failure is None and not stream.closed:
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException as error:
        if stream.failure is not None and stream.failure is not error:
            raise stream.failure from error
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    finally:
        # What a full disk did not take is still in the buffer: closing tries again, and must not hide the failure.
        try:
            stream.close()
        except OSError as error:
            stream.failure = stream.failure or error
    if stream.failure is not None:
        raise stream.failure


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, tried: Path) -> str:
    """Say which file could not be written and why, and what helps; `tried` is where, if the error does not know."""
    path = Path(os.fsdecode(error.filename)) if error.filename is not None else tried
    text = f"{path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += f", {shutil.disk_usage(nearest_existing(path)).free / 1e9:,.3f} GB free there now"
    return f"{text}; {REMEDIES.get(error.errno or 0, 'look after the disk')}"
