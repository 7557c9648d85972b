"""Find the files of a corpus: in a fixed order, each folder once, symbolic-link loops included."""

import hashlib
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

STDLIB = "python:stdlib"


class SkipReason(Enum):
    """Why a file or a document is left out."""

    EMPTY = "empty"
    BINARY = "binary"
    INVALID_UTF8 = "invalid_utf8"
    TOO_LARGE = "too_large"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    NOT_TEXT = "not_text"
    DUPLICATE = "duplicate"
    FOLDER_SEEN = "folder_seen"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class CorpusFile:
    """One file: where it is, its name relative to the path it was found under, its size and time of change."""

    path: Path
    name: bytes
    size_bytes: int
    changed_ns: int


def resolve_path(path: str) -> Path:
    """Return the file or folder a configured path means; `python:stdlib` is the running Python's own library."""
    return Path(sysconfig.get_paths()["stdlib"]) if path == STDLIB else Path(path)


def find_files(
    paths: Sequence[str], suffixes: Sequence[str], exclude_folders: Collection[str], skipped: Counter[SkipReason]
) -> Iterator[CorpusFile]:
    """Yield the files under `paths`, in the order given and sorted by name inside folders.

    A file named in `paths` is taken whatever its suffix; a folder is walked, symbolic links followed, for files that
    end in one of `suffixes`, without the folders named in `exclude_folders` or starting with a dot. A folder that was
    already walked (a link loop, or a second link), a broken link, a pipe or device is counted in `skipped`.
    """
    seen_folders: set[tuple[int, int]] = set()
    walk = _Walk(tuple(suffixes), frozenset(exclude_folders), seen_folders, skipped)
    for configured in paths:
        path = resolve_path(configured)
        if path.is_dir():
            yield from walk.folder(path, b"")
        else:
            yield from walk.file(path, os.fsencode(path.name))


@dataclass(frozen=True)
class _Walk:
    suffixes: tuple[str, ...]
    exclude_folders: frozenset[str]
    seen_folders: set[tuple[int, int]]
    skipped: Counter[SkipReason]

    def folder(self, path: Path, name: bytes) -> Iterator[CorpusFile]:
        try:
            status = path.stat()
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError:
            self.skipped[SkipReason.UNREADABLE] += 1
            return
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen_folders:
            self.skipped[SkipReason.FOLDER_SEEN] += 1
            return
        self.seen_folders.add(identity)
        for entry in entries:
            inner_name = name + os.fsencode(entry.name)
            if _is_folder(entry):
                if entry.name not in self.exclude_folders and not entry.name.startswith("."):
                    yield from self.folder(Path(entry.path), inner_name + b"/")
            elif entry.name.endswith(self.suffixes):
                yield from self.file(Path(entry.path), inner_name)

    def file(self, path: Path, name: bytes) -> Iterator[CorpusFile]:
        try:
            status = path.stat()
        except OSError:
            self.skipped[SkipReason.UNREADABLE] += 1
            return
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for its writer for ever.
            self.skipped[SkipReason.NOT_A_FILE] += 1
            return
        yield CorpusFile(path, name, status.st_size, status.st_mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def describe_files(paths: Sequence[str], suffixes: Sequence[str], exclude_folders: Collection[str]) -> dict[str, Any]:
    """Describe the files under `paths` without reading them: how many, their bytes, a checksum of the listing.

    The listing is names, sizes and times of change, so an edited file makes another description.
    """
    digest = hashlib.sha256()
    num_files = total_bytes = 0
    for file in find_files(paths, suffixes, exclude_folders, Counter()):
        digest.update(b"%s\0%d\0%d\n" % (file.name, file.size_bytes, file.changed_ns))
        num_files += 1
        total_bytes += file.size_bytes
    description: dict[str, Any] = {"paths": list(paths), "num_files": num_files, "total_bytes": total_bytes}
    if STDLIB in paths:
        description["python"] = platform.python_version()
    return {**description, "listing_sha256": digest.hexdigest()}
