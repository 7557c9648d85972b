"""Read documents from text, lines, jsonl or chats: one at a time, the unusable ones counted by reason."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

from elastic.data.chat import Chat, ChatTemplate, NotSeparable, TemplateRefusal
from elastic.data.containers import PARQUET, open_lines, parquet_rows
from elastic.data.conversation import COLUMNS, parse_conversation
from elastic.data.corpus_files import Corpus, CorpusFile, Remark, SkipReason, Tally, find_files, place_of

DRAIN_BYTES = 1 << 20
DETAIL_CHARACTERS = 200
# How files begin that would otherwise be counted as thousands of bad lines: gzip, zstd, xz, zip, bzip2; UTF-16 marks.
BZIP2 = [b"BZh%d1AY&SY" % level for level in range(1, 10)]
COMPRESSED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"PK\x03\x04", *BZIP2)
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
POSITIONS = 1 << 64


@dataclass(frozen=True)
class Document:
    """One usable text, its UTF-8 size, and the 16-byte hash of its content that decides all that looks random.

    `source` is the configured path it came from, `place` where it begins; a conversation's text is the rendered `chat`.
    """

    source: str
    place: str
    text: str
    num_bytes: int
    digest: bytes
    chat: Chat | None = None

    @property
    def split_position(self) -> int:
        """Return the content's number in 0..2**64-1 that decides between training and validation."""
        return int.from_bytes(self.digest[:8])

    @property
    def sample_position(self) -> int:
        """Return an independent number in 0..2**64-1 that decides who the tokenizer is trained on."""
        return int.from_bytes(self.digest[8:])


def read_documents(corpus: Corpus, tally: Tally, template: ChatTemplate | None = None) -> Iterator[Document]:
    """Yield the usable documents of `corpus` in its order and count them, and the others, in `tally`.

    Conversations are rendered by `template`.
    Holds one document in memory, plus about 130 bytes per distinct document when duplicates are skipped.
    """
    seen: set[bytes] = set()
    for file in find_files(corpus, tally):
        for line, raw in _raw_documents(file, corpus):
            document: Document | SkipReason
            detail, place = "", place_of(file.path, line)
            try:
                document = raw if isinstance(raw, SkipReason) else _document(raw, file.source, place, corpus, template)
            except TemplateRefusal as error:
                document, detail = SkipReason.REFUSED, str(error)[:DETAIL_CHARACTERS]
            except NotSeparable:
                document = SkipReason.NOT_SEPARABLE
            if isinstance(document, Document) and document.digest in seen:
                document = SkipReason.DUPLICATE
            if isinstance(document, SkipReason):
                tally.skip(document, file.path, line, detail=detail)
                continue
            if corpus.max_bytes is not None and tally.kept_bytes + document.num_bytes > corpus.max_bytes:
                tally.stopped_at_max_bytes = True
                return
            if corpus.skip_duplicates:
                seen.add(document.digest)
            tally.kept += 1
            tally.kept_bytes += document.num_bytes
            tally.digest.update(document.digest)
            if document.chat is not None and document.chat.conversation.ends_without_answer:
                tally.remark(Remark.ENDS_WITHOUT_ANSWER, place)
            if document.chat is not None and document.chat.spelled:
                tally.remark(Remark.SPELLS_SPECIAL_TOKEN, place)
            yield document


def _raw_documents(file: CorpusFile, corpus: Corpus) -> Iterator[tuple[int | None, bytes | SkipReason]]:
    """Yield (line number from 1, raw bytes or why there are none); the number is None where it is about the file."""
    limit = corpus.max_document_bytes
    try:
        if corpus.document_format == "text":
            yield None, _whole_file(file, limit)
        elif corpus.document_format == "chat" and file.path.suffix == PARQUET:
            for number, row in enumerate(parquet_rows(file.path, COLUMNS), start=1):
                yield number, row if len(row) <= limit else SkipReason.TOO_LARGE
        elif corpus.document_format == "chat":
            with open_lines(file.path) as stream:
                yield from _lines(stream, limit)
        else:
            with file.path.open("rb") as stream:
                yield from _lines(stream, limit)
    except OSError:
        yield None, SkipReason.UNREADABLE


def _whole_file(file: CorpusFile, limit: int) -> bytes | SkipReason:
    if file.size_bytes > limit:
        return SkipReason.TOO_LARGE
    with file.path.open("rb") as stream:
        content = stream.read(file.size_bytes + 1)  # one more, so that a file that grows is noticed
    if len(content) != file.size_bytes:
        return SkipReason.CHANGED
    return _no_plain_text(content) or content


def _lines(stream: "BufferedReader[Any]", limit: int) -> Iterator[tuple[int | None, bytes | SkipReason]]:
    if reason := _no_plain_text(stream.peek(max(map(len, COMPRESSED)))):
        yield None, reason
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


def _no_plain_text(start: bytes) -> SkipReason | None:
    """Say why a file that begins so is no plain text, None if it may be."""
    if start.startswith(COMPRESSED):
        return SkipReason.COMPRESSED
    return SkipReason.UTF16 if start.startswith(UTF16) else None


def _document(
    raw: bytes, source: str, place: str, corpus: Corpus, template: ChatTemplate | None
) -> Document | SkipReason:
    if b"\0" in raw:
        return SkipReason.BINARY
    chat = content = None
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode()
        if template is not None and text.strip():
            conversation = parse_conversation(text, template.loss_on)
            if isinstance(conversation, SkipReason):
                return conversation
            content = conversation.content()
            chat = template.render(conversation)
            text = chat.text
        if corpus.document_format == "jsonl" and text.strip():
            found = _text_in_json(text, corpus.text_field)
            if isinstance(found, SkipReason):
                return found
            text = found
        if not text.strip():
            return SkipReason.EMPTY
        if "\0" in text:
            return SkipReason.BINARY
        encoded = text.encode()
    except UnicodeError:  # also half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return SkipReason.INVALID_UTF8
    # What is said decides, not how a template writes it: the same conversation is always on the same side.
    digest = hashlib.blake2b(content or encoded, digest_size=16, person=b"elastic-document").digest()
    return Document(source, place, text, len(encoded), digest, chat)


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
