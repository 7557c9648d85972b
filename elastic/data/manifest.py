"""Record what a prepared data folder holds, and refuse a folder that no longer holds it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from elastic.data.shards import shard_problem, shards_in
from elastic.space.ranges import DataChecks
from elastic.world.files import file_problems, first_few, sha256_of

MANIFEST_NAME = "data.json"
FORMAT = "elastic-data-4"
# 3: without chats; 2: also without sources, begin-of-text and the tokenizer's other files.
READABLE_FORMATS = (FORMAT, "elastic-data-3", "elastic-data-2")
MASK_SUFFIX = ".mask"  # beside .bin and .idx: a bit for every token, the lowest of a byte first
SAMPLED_BLOCKS = 64
SAMPLED_BLOCK_BYTES = 64 * 1024
REMEDY = "prepare the data again with overwrite=true"


class DataError(ValueError):
    """Data, or a setting of its preparation, that cannot be used."""


@dataclass(frozen=True)
class FileRecord:
    """Size and checksums of one file. `sampled_sha256` covers 64 blocks spread over it, quick at any size."""

    size_bytes: int
    sha256: str
    sampled_sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """What one split holds: kept documents, their tokens (one end-of-text each included), their text, its files.

    `sources` says how many of the tokens came from each configured path, one path's behind the other's in this order.
    `num_counted` tokens are marked by the loss mask among the files; None: there is no mask, and the loss counts all.
    """

    num_documents: int
    num_tokens: int
    text_bytes: int
    files: Mapping[str, FileRecord]
    sources: Mapping[str, int] = field(default_factory=dict)
    num_counted: int | None = None

    def num_sequences(self, length: int) -> int:
        """Count the sequences of `length` tokens and the one that follows, none of two sources."""
        return sum((num_tokens - 1) // length for num_tokens in (self.sources or {"": self.num_tokens}).values())


@dataclass
class SkipRecord:
    """How many documents or files were left out for one reason, and the first of them: `file` or `file:line`."""

    count: int
    example: str


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that wrote the token ids. `vocab_size` is the largest id + 1, before any padding of the model.

    `bos_ids` stand in front of every document; `files` holds the sha256 of every file of the tokenizer.
    """

    vocab_size: int
    eos_token: str
    eos_id: int
    trained: bool
    sha256: str
    bos_ids: Sequence[int] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything `data.json` says about a prepared folder.

    `settings` and `source` decide whether a later call asks for the same data. `skipped` is by reason; `remarks` count
    documents that were taken and that somebody may want to know of.
    `documents_sha256` is a checksum of all kept documents in order; `stopped_at_max_bytes` says that more were there.
    """

    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    num_documents: int
    skipped: Mapping[str, SkipRecord]
    stopped_at_max_bytes: bool
    documents_sha256: str
    tokenizer: TokenizerRecord
    dtype: str
    splits: Mapping[str, SplitRecord]
    remarks: Mapping[str, SkipRecord] = field(default_factory=dict)

    @property
    def packing(self) -> Literal["isolated", "concatenated"]:
        """Return how its documents stand in sequences where nobody says otherwise: of chats none sees another."""
        return "isolated" if self.settings.get("document_format") == "chat" else "concatenated"

    @property
    def is_joined(self) -> bool:
        """Tell whether its files are those of shards, each in a folder of its own."""
        return "shards" in self.settings

    def write(self, folder: Path) -> None:
        """Write `data.json` into `folder`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=True)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read `data.json` of a prepared folder; raises DataError when it is absent or not one of ours."""
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if shards_in(folder):
            problem = shard_problem(folder) or "holds all shards, not joined; prepare one of them again to join them"
            raise DataError(f"{folder}: {problem}") from None
        raise DataError(f"{folder} is not a prepared data folder, it has no {MANIFEST_NAME}; {REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {REMEDY}") from error
    if not isinstance(content, dict) or content.pop("format", None) not in READABLE_FORMATS:
        raise DataError(f"{path} is not in the format {FORMAT}; {REMEDY}")
    try:
        splits = {name: _split_from(**record) for name, record in content.pop("splits").items()}
        tokenizer = content.pop("tokenizer")
        tokenizer = TokenizerRecord(**tokenizer | {"bos_ids": tuple(tokenizer.get("bos_ids", ()))})
        skipped, remarks = (
            {reason: SkipRecord(**record) for reason, record in records.items()}
            for records in (content.pop("skipped"), content.pop("remarks", {}))
        )
        return Manifest(**content, tokenizer=tokenizer, splits=splits, skipped=skipped, remarks=remarks)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} lacks a field or has one too many ({error}); {REMEDY}") from error


def holds_chats(folder: Path) -> bool:
    """Tell whether a folder was prepared from conversations; False of one that cannot be read, which opening says."""
    try:
        return read_manifest(folder).packing == "isolated"
    except DataError:
        return False


def _split_from(files: dict[str, Any], **others: Any) -> SplitRecord:
    return SplitRecord(files={name: FileRecord(**record) for name, record in files.items()}, **others)


def record_file(path: Path) -> FileRecord:
    """Measure one finished file: its size and both checksums (reads all of it)."""
    return FileRecord(path.stat().st_size, sha256_of(path), sampled_sha256(path))


def sampled_sha256(path: Path) -> str:
    """Hash the size and 64 blocks of 64 KiB spread evenly over a file: everything up to 4 MiB, a sample beyond."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLED_BLOCK_BYTES)
    with path.open("rb") as stream:
        for block in range(SAMPLED_BLOCKS):
            # Evenly spread, first and last block included; they tile the file when it is no larger than all blocks.
            stream.seek(last * block // (SAMPLED_BLOCKS - 1))
            digest.update(stream.read(SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()


def checked_manifest(folder: Path, splits: Iterable[str] | None = None, *, verify: DataChecks = "sampled") -> Manifest:
    """Read the manifest; raises DataError unless the splits (None: all) and the tokenizer are what it says.

    Names files that are missing, truncated, swapped or altered. Reads of each file of a split nothing (`sizes`), at
    most 4 MiB (`sampled`; of shards nothing, that is done when one is first read), or all of it (`full`); of the
    tokenizer everything, settings and chat template included.
    """
    manifest = read_manifest(folder)
    contents = verify == "full" or (verify == "sampled" and not manifest.is_joined)
    for split in manifest.splits if splits is None else splits:
        if split not in manifest.splits:
            held = ", ".join(manifest.splits)
            raise DataError(f"{folder}: no split {split!r}, it holds {held}; prepare with a {split}_ratio")
        files = manifest.splits[split].files
        sizes = {name: record.size_bytes for name, record in files.items()}
        judge = partial(_content_problem, files, verify == "full") if contents else lambda name, path: None
        if problems := file_problems(folder, sizes, judge):
            raise DataError(f"{folder}: {'; '.join(first_few(problems))}; restore it or {REMEDY}")
    for name, sha256 in {"tokenizer.json": manifest.tokenizer.sha256, **manifest.tokenizer.files}.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            raise DataError(
                f"{folder / name} is missing or is not the one the tokens were made with; restore it or {REMEDY}"
            )
    return manifest


def _content_problem(files: Mapping[str, FileRecord], full: bool, name: str, path: Path) -> str | None:
    return content_problem(path, files[name], full=full)


def content_problem(path: Path, record: FileRecord, *, full: bool) -> str | None:
    """Say whether a file of the right size holds something else than its record says."""
    same = sampled_sha256(path) == record.sampled_sha256 and (not full or record_file(path) == record)
    return None if same else "has the right size and another content"
