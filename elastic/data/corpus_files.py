"""Find the files of a corpus: in a fixed order, each folder once, loops of links included; count what is none."""

import hashlib
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

STDLIB = "python:stdlib"
STDLIB_SUFFIXES = (".py",)
STDLIB_EXCLUDED = ("__pycache__", "site-packages", "test", "tests", "idle_test")
JSON_LINES = (".jsonl", ".ndjson", ".json")


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
    MESSAGES = "chat_messages"
    JSON_LINES = "json_lines_not_read_as_text"
    OTHER_SUFFIX = "other_suffix"
    EXCLUDED_FOLDER = "in_excluded_folder"
    HIDDEN = "hidden"


@dataclass
class Skips:
    """What was left out: how many by reason, and where the first of each stands, as `file` or `file:line`."""

    counts: Counter[SkipReason] = field(default_factory=Counter)
    examples: dict[SkipReason, str] = field(default_factory=dict)

    def add(self, reason: SkipReason, path: Path, line: int | None = None, count: int = 1) -> None:
        """Count `count` files, or one document that begins in `line` (from 1) of a file."""
        self.counts[reason] += count
        if reason not in self.examples:
            # A name need not be UTF-8; what a report shows must be.
            name = os.fsencode(path).decode(errors="backslashreplace")
            self.examples[reason] = name if line is None else f"{name}:{line}"


@dataclass(frozen=True)
class CorpusFile:
    """One file: the configured path it was found under, where it is, its name below that, its size, time of change."""

    source: str
    path: Path
    name: bytes
    size_bytes: int
    changed_ns: int


def resolve_path(path: str) -> Path:
    """Return the file or folder a configured path means; `python:stdlib` is the running Python's own library."""
    return Path(sysconfig.get_paths()["stdlib"]) if path == STDLIB else Path(path)


@dataclass(frozen=True)
class FileChoice:
    """Which files of a folder are taken: those that end in one of `suffixes`, outside folders of `exclude_folders`.

    None means what suits the source: of `python:stdlib` its .py files without tests and installed packages; of any
    other folder every file if `json_lines` is false (but none that is named like JSON lines), else .jsonl, .ndjson and
    .json. Hidden files and folders are never taken, a file named by itself always.
    """

    suffixes: tuple[str, ...] | None = None
    exclude_folders: tuple[str, ...] | None = None
    json_lines: bool = False

    def suffixes_of(self, source: str) -> tuple[str, ...]:
        """Return the endings taken from a source; the empty one is every file's."""
        if self.suffixes is not None:
            return self.suffixes
        return STDLIB_SUFFIXES if source == STDLIB else JSON_LINES if self.json_lines else ("",)

    def excluded_in(self, source: str) -> tuple[str, ...]:
        """Return the names of the folders of a source that are passed over."""
        if self.exclude_folders is not None:
            return self.exclude_folders
        return STDLIB_EXCLUDED if source == STDLIB else ()

    def refusal(self, source: str, name: str) -> SkipReason | None:
        """Say why a file of a folder is passed over, None if it is taken."""
        if name.startswith("."):
            return SkipReason.HIDDEN
        if self.suffixes is None and not self.json_lines and source != STDLIB and name.endswith(JSON_LINES[:2]):
            return SkipReason.JSON_LINES
        return None if name.endswith(self.suffixes_of(source)) else SkipReason.OTHER_SUFFIX


def find_files(paths: Sequence[str], choice: FileChoice, skipped: Skips) -> Iterator[CorpusFile]:
    """Yield the files under `paths`, sources in order of their names whatever order they are given in, files likewise.

    So the same sources give the same data. Folders are walked, symbolic links followed. Every file passed over is
    counted in `skipped` with its reason: by `choice`, in a folder already walked (a link loop, or a second link), a
    broken link, a pipe or device.
    """
    seen_folders: set[tuple[int, int]] = set()
    for source in sorted(paths):
        walk = _Walk(source, choice, skipped, seen_folders)
        path = resolve_path(source)
        if path.is_dir():
            yield from walk.folder(path)
        else:
            yield from walk.file(path, os.fsencode(path.name))


@dataclass(frozen=True)
class _Walk:
    source: str
    choice: FileChoice
    skipped: Skips
    seen_folders: set[tuple[int, int]]

    def folder(self, top: Path) -> Iterator[CorpusFile]:
        # A stack and not a recursion: folders can be nested deeper than Python calls.
        waiting = [(iter(self._entries(top)), b"")]
        excluded = self.choice.excluded_in(self.source)
        while waiting:
            entries, name = waiting[-1]
            entry = next(entries, None)
            if entry is None:
                waiting.pop()
                continue
            inner_name = name + os.fsencode(entry.name)
            path = Path(entry.path)
            if _is_folder(entry):
                if entry.name in excluded or entry.name.startswith("."):
                    reason = SkipReason.EXCLUDED_FOLDER if entry.name in excluded else SkipReason.HIDDEN
                    num_files = sum(len(files) for _, _, files in os.walk(path))
                    if num_files:
                        self.skipped.add(reason, path, count=num_files)
                else:
                    waiting.append((iter(self._entries(path)), inner_name + b"/"))
            elif refusal := self.choice.refusal(self.source, entry.name):
                self.skipped.add(refusal, path)
            else:
                yield from self.file(path, inner_name)

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
        yield CorpusFile(self.source, path, name, status.st_size, status.st_mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def describe_files(paths: Sequence[str], choice: FileChoice) -> dict[str, Any]:
    """Describe the files under `paths` without reading them: how many, their bytes, a checksum of the listing.

    The listing is names, sizes and times of change, so an edited file makes another description.
    """
    digest = hashlib.sha256()
    num_files = total_bytes = 0
    for file in find_files(paths, choice, Skips()):
        digest.update(b"%s\0%d\0%d\n" % (file.name, file.size_bytes, file.changed_ns))
        num_files += 1
        total_bytes += file.size_bytes
    description: dict[str, Any] = {"paths": sorted(paths), "num_files": num_files, "total_bytes": total_bytes}
    if STDLIB in paths:
        description["python"] = platform.python_version()
    return {**description, "listing_sha256": digest.hexdigest()}
