"""Read documents from text, lines or jsonl: one at a time, the unusable ones counted by reason."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from elastic.data.corpus_files import CorpusFile, FileChoice, SkipReason, Skips, find_files

DRAIN_BYTES = 1 << 20
# How files begin that would otherwise be counted as thousands of bad lines: gzip, zstd, xz, bzip2, zip; UTF-16 marks.
SIGNATURES = {
    b"\x1f\x8b\x08": SkipReason.COMPRESSED,
    b"\x28\xb5\x2f\xfd": SkipReason.COMPRESSED,
    b"\xfd7zXZ\x00": SkipReason.COMPRESSED,
    b"PK\x03\x04": SkipReason.COMPRESSED,
    **{b"BZh%d1AY&SY" % level: SkipReason.COMPRESSED for level in range(1, 10)},
    b"\xff\xfe": SkipReason.UTF16,
    b"\xfe\xff": SkipReason.UTF16,
}
SIGNATURE_BYTES = max(map(len, SIGNATURES))
POSITIONS = 1 << 64


class DocumentFormat(StrEnum):
    """How a file is cut into documents."""

    TEXT = "text"
    LINES = "lines"
    JSONL = "jsonl"


@dataclass(frozen=True)
class Corpus:
    """Where documents come from and which are refused.

    `max_bytes` ends the corpus before the first document that would exceed it in sum, None takes all.
    `max_document_bytes` bounds the raw bytes of one document (the whole line in lines and jsonl).
    """

    paths: tuple[str, ...]
    document_format: DocumentFormat = DocumentFormat.TEXT
    text_field: str = "text"
    suffixes: tuple[str, ...] | None = None
    exclude_folders: tuple[str, ...] | None = None
    max_bytes: int | None = None
    max_document_bytes: int = 16 << 20
    skip_duplicates: bool = True

    @property
    def file_choice(self) -> FileChoice:
        """Return which files of the folders are read."""
        return FileChoice(self.suffixes, self.exclude_folders, self.document_format == DocumentFormat.JSONL)


@dataclass(frozen=True)
class Document:
    """One usable text, its UTF-8 size, and the 16-byte hash of its content that decides all that looks random.

    `source` is the configured path it came from.
    """

    source: str
    text: str
    num_bytes: int
    digest: bytes

    @property
    def split_position(self) -> int:
        """Return the content's number in 0..2**64-1 that decides between training and validation."""
        return int.from_bytes(self.digest[:8])

    @property
    def sample_position(self) -> int:
        """Return an independent number in 0..2**64-1 that decides who the tokenizer is trained on."""
        return int.from_bytes(self.digest[8:])


@dataclass
class Tally:
    """Count what reading met. `kept` and `kept_bytes` grow as documents are yielded."""

    kept: int = 0
    kept_bytes: int = 0
    stopped_at_max_bytes: bool = False
    skipped: Skips = field(default_factory=Skips)


def read_documents(corpus: Corpus, tally: Tally) -> Iterator[Document]:
    """Yield the usable documents of `corpus` in its order and count the others in `tally`.

    Holds one document in memory, plus about 130 bytes per distinct document when duplicates are skipped.
    """
    seen: set[bytes] = set()
    for file in find_files(corpus.paths, corpus.file_choice, tally.skipped):
        for line, raw in _raw_documents(file, corpus):
            document = raw if isinstance(raw, SkipReason) else _document(raw, file.source, corpus)
            if isinstance(document, Document) and document.digest in seen:
                document = SkipReason.DUPLICATE
            if isinstance(document, SkipReason):
                tally.skipped.add(document, file.path, line)
                continue
            if corpus.max_bytes is not None and tally.kept_bytes + document.num_bytes > corpus.max_bytes:
                tally.stopped_at_max_bytes = True
                return
            if corpus.skip_duplicates:
                seen.add(document.digest)
            tally.kept += 1
            tally.kept_bytes += document.num_bytes
            yield document


def _raw_documents(file: CorpusFile, corpus: Corpus) -> Iterator[tuple[int | None, bytes | SkipReason]]:
    """Yield (line number from 1, raw bytes or why there are none); the number is None where it is about the file."""
    limit = corpus.max_document_bytes
    try:
        if corpus.document_format == DocumentFormat.TEXT:
            yield None, _whole_file(file, limit)
        else:
            yield from _lines(file, limit)
    except OSError:
        yield None, SkipReason.UNREADABLE


def _whole_file(file: CorpusFile, limit: int) -> bytes | SkipReason:
    if file.size_bytes > limit:
        return SkipReason.TOO_LARGE
    with file.path.open("rb") as stream:
        content = stream.read(file.size_bytes + 1)  # one more, so that a file that grows is noticed
    if len(content) != file.size_bytes:
        return SkipReason.CHANGED
    return _signature(content) or content


def _lines(file: CorpusFile, limit: int) -> Iterator[tuple[int | None, bytes | SkipReason]]:
    with file.path.open("rb") as stream:
        known = _signature(stream.peek(SIGNATURE_BYTES))
        if known is not None:
            yield None, known
            return
        number = 0
        while line := stream.readline(limit + 1):
            number += 1
            if len(line) <= limit or line.endswith(b"\n"):
                yield number, line.removesuffix(b"\n").removesuffix(b"\r")
                continue
            # Drop the rest of an endless line in small pieces, so that its size never matters.
            while line and not line.endswith(b"\n"):
                line = stream.readline(DRAIN_BYTES)
            yield number, SkipReason.TOO_LARGE


def _signature(start: bytes) -> SkipReason | None:
    return next((reason for signature, reason in SIGNATURES.items() if start.startswith(signature)), None)


def _document(raw: bytes, source: str, corpus: Corpus) -> Document | SkipReason:
    text = _decode(raw)
    if isinstance(text, str) and corpus.document_format == DocumentFormat.JSONL and text.strip():
        text = _text_in_json(text, corpus.text_field)
    if isinstance(text, SkipReason):
        return text
    if not text.strip():
        return SkipReason.EMPTY
    if "\0" in text:
        return SkipReason.BINARY
    try:
        content = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return SkipReason.INVALID_UTF8
    digest = hashlib.blake2b(content, digest_size=16, person=b"elastic-document").digest()
    return Document(source, text, len(content), digest)


def _decode(raw: bytes) -> str | SkipReason:
    if b"\0" in raw:
        return SkipReason.BINARY
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return SkipReason.INVALID_UTF8


def _text_in_json(line: str, text_field: str) -> str | SkipReason:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return SkipReason.INVALID_JSON
    if not isinstance(record, dict):
        return SkipReason.NOT_AN_OBJECT
    text = record.get(text_field)
    if isinstance(text, str):
        return text
    if _is_messages(text) or (text_field not in record and _is_messages(record.get("messages"))):
        return SkipReason.MESSAGES
    return SkipReason.NOT_TEXT if text_field in record else SkipReason.MISSING_FIELD


def _is_messages(value: Any) -> bool:
    """Tell whether a field holds the messages of a chat: objects with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)
