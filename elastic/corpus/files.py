"""Find the files of a corpus: in a fixed order, each folder once, loops of links included; count what is none."""

import hashlib
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from elastic.data.manifest import SkipRecord
from elastic.space.ranges import Bytes, Range, Required

STDLIB = "python:stdlib"
STDLIB_EXCLUDED = ("__pycache__", "site-packages", "test", "tests", "idle_test")
JSON_LINES = (".jsonl", ".ndjson", ".json")
CHAT_FILES = (*JSON_LINES, *(name + packed for name in JSON_LINES for packed in (".gz", ".zst")), ".parquet")


class SkipReason(StrEnum):
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
    BAD_MESSAGE = "bad_message"
    MISSING_ROLE = "missing_role"
    UNKNOWN_FIELD = "unknown_message_field"
    EMPTY_ANSWER = "empty_answer"
    NO_RESPONSE = "no_response"
    REFUSED = "refused_by_template"
    NOT_SEPARABLE = "special_token_not_separable"


class Remark(StrEnum):
    """What is worth counting about documents that are taken."""

    ENDS_WITHOUT_ANSWER = "ends_without_answer"
    SPELLS_SPECIAL_TOKEN = "spells_special_token"


@dataclass(frozen=True)
class Corpus:
    """Say which files are read, and which documents are taken from them.

    paths: files and folders, read in order of their names; `python:stdlib` is the running Python's own library.
    suffixes, exclude_folders: which files of folders are taken, and folders of which names are not looked into. None:
        of the library its .py files without tests and installed packages; of any other folder .jsonl, .ndjson and .json
        for jsonl, these also packed as .gz or .zst and .parquet for chat, else every file not named like JSON lines.
        Hidden ones are never taken, a file named itself always.
    document_format: `text` (a file is a document), `lines` (a line is), `jsonl` (field `text_field` of a line is),
        `chat` (the conversation in field `messages` of a line, or of a row of parquet, is).
    max_bytes: ends the corpus before the first document that would exceed it in sum, None takes everything.
    max_document_bytes: larger documents are skipped, counted raw (the whole line in lines and jsonl).
    """

    paths: Annotated[list[str], Range(low=1)] = field(default_factory=lambda: [STDLIB])
    document_format: Literal["text", "lines", "jsonl", "chat"] = "text"
    text_field: Annotated[str, Required("for example text")] = "text"
    suffixes: Annotated[list[str], Range(low=1)] | None = None
    exclude_folders: list[str] | None = None
    max_bytes: Bytes | None = None
    max_document_bytes: Bytes = 16 << 20
    skip_duplicates: bool = True

    def file_refusal(self, source: str, name: str) -> SkipReason | None:
        """Say why a file in a folder of `source` is passed over, None if it is taken."""
        taken = {"jsonl": JSON_LINES, "chat": CHAT_FILES}.get(self.document_format)
        if name.startswith("."):
            return SkipReason.HIDDEN
        if self.suffixes is not None:
            suffixes = tuple(self.suffixes)
        elif source == STDLIB:
            suffixes = (".py",)
        elif taken is None and name.endswith(JSON_LINES[:2]):
            return SkipReason.JSON_LINES
        else:
            suffixes = taken or ("",)
        return None if name.endswith(suffixes) else SkipReason.OTHER_SUFFIX

    def folder_refusal(self, source: str, name: str) -> SkipReason | None:
        """Say why a folder inside one of `source` is not looked into, None if it is."""
        standard = STDLIB_EXCLUDED if source == STDLIB else ()
        if name in (standard if self.exclude_folders is None else self.exclude_folders):
            return SkipReason.EXCLUDED_FOLDER
        return SkipReason.HIDDEN if name.startswith(".") else None


@dataclass
class Tally:
    """Count what reading met: documents as they are yielded, and by reason what was left out, or is worth knowing.

    `digest` runs over the kept documents in order.
    """

    kept: int = 0
    kept_bytes: int = 0
    stopped_at_max_bytes: bool = False
    skipped: dict[str, SkipRecord] = field(default_factory=dict)
    remarks: dict[str, SkipRecord] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)

    def skip(
        self, reason: SkipReason, path: Path, line: int | None = None, count: int = 1, *, detail: str = ""
    ) -> None:
        """Count `count` files, or one document that begins in `line` (from 1) of a file; `detail` of the first."""
        first = SkipRecord(0, place_of(path, line) + (f": {detail}" if detail else ""))
        self.skipped.setdefault(reason, first).count += count

    def add(self, skipped: Mapping[str, SkipRecord]) -> None:
        """Count what was left out elsewhere, after what is counted already."""
        for reason, record in skipped.items():
            self.skipped.setdefault(reason, SkipRecord(0, record.example)).count += record.count

    def remark(self, remark: Remark, place: str) -> None:
        """Count a document that is taken; `place` is where it begins."""
        self.remarks.setdefault(remark, SkipRecord(0, place)).count += 1


def place_of(path: Path, line: int | None) -> str:
    """Write where a document begins: `file` or `file:line`. A name need not be UTF-8; what a report shows must be."""
    name = os.fsencode(path).decode(errors="backslashreplace")
    return name if line is None else f"{name}:{line}"


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


def find_files(corpus: Corpus, tally: Tally) -> Iterator[CorpusFile]:
    """Yield the files of `corpus`, sources in order of their names whatever order they are given in, files likewise.

    So the same sources give the same data. Folders are walked, symbolic links followed. Every file passed over is
    counted in `tally` with its reason: by the corpus' choice, in a folder already walked (a link loop, or a second
    link), a broken link, a pipe or device.
    """
    seen_folders: set[tuple[int, int]] = set()
    for source in sorted(corpus.paths):
        top = resolve_path(source)
        # A stack and not a recursion: folders can be nested deeper than Python calls.
        waiting = [iter([(top, os.fsencode(top.name))])]
        while waiting:
            path, name = next(waiting[-1], (None, b""))
            if path is None:
                waiting.pop()
                continue
            is_inside, status = len(waiting) > 1, _status(path)
            if status is not None and stat.S_ISDIR(status.st_mode):
                if is_inside and (reason := corpus.folder_refusal(source, path.name)):
                    if num_files := sum(len(files) for _, _, files in os.walk(path)):
                        tally.skip(reason, path, count=num_files)
                    continue
                prefix = name + b"/" if is_inside else b""
                children = _children(path, status, seen_folders, tally)
                waiting.append(iter([(path / child, prefix + os.fsencode(child)) for child in children]))
            elif is_inside and (reason := corpus.file_refusal(source, path.name)):
                tally.skip(reason, path)
            elif status is None:
                tally.skip(SkipReason.UNREADABLE, path)
            elif not stat.S_ISREG(status.st_mode):
                tally.skip(SkipReason.NOT_A_FILE, path)  # opening a pipe would wait for its writer for ever
            else:
                yield CorpusFile(source, path, name, status.st_size, status.st_mtime_ns)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # a broken link, one that leads to itself, or no permission
        return None


def _children(path: Path, status: os.stat_result, seen: set[tuple[int, int]], tally: Tally) -> list[str]:
    """Return what is in a folder, by name; nothing the second time, or when it cannot be listed."""
    identity = (status.st_dev, status.st_ino)
    try:
        names = sorted(os.listdir(path), key=os.fsencode)
    except OSError:
        tally.skip(SkipReason.UNREADABLE, path)
        return []
    if identity in seen:
        tally.skip(SkipReason.FOLDER_SEEN, path)
        return []
    seen.add(identity)
    return names


def describe_files(corpus: Corpus) -> dict[str, Any]:
    """Describe the files of `corpus` without reading them: how many, their bytes, a checksum of the listing.

    The listing is names, sizes and times of change, so an edited file makes another description.
    """
    digest = hashlib.sha256()
    num_files = total_bytes = 0
    for file in find_files(corpus, Tally()):
        digest.update(b"%s\0%d\0%d\n" % (file.name, file.size_bytes, file.changed_ns))
        num_files += 1
        total_bytes += file.size_bytes
    description: dict[str, Any] = {"paths": sorted(corpus.paths), "num_files": num_files, "total_bytes": total_bytes}
    if STDLIB in corpus.paths:
        description["python"] = platform.python_version()
    return {**description, "listing_sha256": digest.hexdigest()}
