"""Find the files of a corpus: in a fixed order, each folder once, loops of links included; count what is none."""

import hashlib
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

STDLIB = "python:stdlib"


class SkipReason(Enum):
    """Why a file or a document is left out."""

    EMPTY = "empty"
    BINARY = "binary"
    COMPRESSED = "compressed"
    UTF16 = "utf16"
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
    CHANGED = "changed"


@dataclass
class Skips:
    """What was left out: how many by reason, and where the first of each stands, as `file` or `file:line`."""

    counts: Counter[SkipReason] = field(default_factory=Counter)
    examples: dict[SkipReason, str] = field(default_factory=dict)

    def add(self, reason: SkipReason, path: Path, line: int | None = None) -> None:
        """Count one file, or one document that begins in `line` (from 1) of a file."""
        self.counts[reason] += 1
        if reason not in self.examples:
            # A name need not be UTF-8; what a report shows must be.
            name = os.fsencode(path).decode(errors="backslashreplace")
            self.examples[reason] = name if line is None else f"{name}:{line}"


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
    paths: Sequence[str], suffixes: Sequence[str], exclude_folders: Collection[str], skipped: Skips
) -> Iterator[CorpusFile]:
    """Yield the files under `paths`, in the order given and sorted by name inside folders.

    A file named in `paths` is taken whatever its suffix; a folder is walked, symbolic links followed, for files that
    end in one of `suffixes`, without the folders named in `exclude_folders` or starting with a dot. A folder that was
    already walked (a link loop, or a second link), a broken link, a pipe or device is counted in `skipped`.
    """
    walk = _Walk(tuple(suffixes), frozenset(exclude_folders), skipped, seen_folders=set())
    for configured in paths:
        path = resolve_path(configured)
        if path.is_dir():
            yield from walk.folder(path)
        else:
            yield from walk.file(path, os.fsencode(path.name))


@dataclass(frozen=True)
class _Walk:
    suffixes: tuple[str, ...]
    exclude_folders: frozenset[str]
    skipped: Skips
    seen_folders: set[tuple[int, int]]

    def folder(self, top: Path) -> Iterator[CorpusFile]:
        # A stack and not a recursion: folders can be nested deeper than Python calls.
        waiting = [(iter(self._entries(top)), b"")]
        while waiting:
            entries, name = waiting[-1]
            entry = next(entries, None)
            if entry is None:
                waiting.pop()
                continue
            inner_name = name + os.fsencode(entry.name)
            if _is_folder(entry):
                if entry.name not in self.exclude_folders and not entry.name.startswith("."):
                    waiting.append((iter(self._entries(Path(entry.path))), inner_name + b"/"))
            elif entry.name.endswith(self.suffixes):
                yield from self.file(Path(entry.path), inner_name)

    def _entries(self, path: Path) -> list[os.DirEntry[str]]:
        """Return what is in a folder, by name; nothing the second time, or when it cannot be listed."""
        try:
            status = path.stat()
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError:
            self.skipped.add(SkipReason.UNREADABLE, path)
            return []
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen_folders:
            self.skipped.add(SkipReason.FOLDER_SEEN, path)
            return []
        self.seen_folders.add(identity)
        return entries

    def file(self, path: Path, name: bytes) -> Iterator[CorpusFile]:
        try:
            status = path.stat()
        except OSError:
            self.skipped.add(SkipReason.UNREADABLE, path)
            return
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for its writer for ever.
            self.skipped.add(SkipReason.NOT_A_FILE, path)
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
    for file in find_files(paths, suffixes, exclude_folders, Skips()):
        digest.update(b"%s\0%d\0%d\n" % (file.name, file.size_bytes, file.changed_ns))
        num_files += 1
        total_bytes += file.size_bytes
    description: dict[str, Any] = {"paths": list(paths), "num_files": num_files, "total_bytes": total_bytes}
    if STDLIB in paths:
        description["python"] = platform.python_version()
    return {**description, "listing_sha256": digest.hexdigest()}
