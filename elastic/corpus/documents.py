"""Make documents of raw blocks: text, lines, jsonl or chats; the unusable ones by reason."""

import codecs
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from elastic.corpus.blocks import Block, Passed, Raw
from elastic.corpus.chat import Chat, ChatTemplate, NotSeparable, TemplateRefusal
from elastic.corpus.containers import PARQUET, rows_of
from elastic.corpus.conversation import parse_conversation, parse_object
from elastic.corpus.files import Corpus, SkipReason, place_of
from elastic.data.manifest import SkipRecord

DETAIL_CHARACTERS = 200
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


def split_position(digest: bytes) -> int:
    """Return the content's number in 0..2**64-1 that decides between training and validation."""
    return int.from_bytes(digest[:8])


def sample_position(digest: bytes) -> int:
    """Return an independent number in 0..2**64-1 that decides who the tokenizer is trained on."""
    return int.from_bytes(digest[8:])


def parse_block(block: Block, corpus: Corpus, template: ChatTemplate | None = None) -> Iterator[Document | Passed]:
    """Yield the usable documents of a block in its order, conversations rendered by `template`, and what is not usable.

    Copies of a document are documents.
    """
    for part in block:
        if not isinstance(part, Raw):
            yield part
            continue
        try:
            for line, raw in _cut(part, corpus):
                document: Document | SkipReason
                detail, place = "", part.place(line)
                try:
                    too_large = len(raw) > corpus.max_document_bytes
                    document = SkipReason.TOO_LARGE if too_large else _document(raw, part, place, corpus, template)
                except TemplateRefusal as error:
                    document, detail = SkipReason.REFUSED, f": {str(error)[:DETAIL_CHARACTERS]}"
                except NotSeparable:
                    document = SkipReason.NOT_SEPARABLE
                yield {document: SkipRecord(1, place + detail)} if isinstance(document, SkipReason) else document
        except OSError:
            yield {SkipReason.UNREADABLE: SkipRecord(1, place_of(part.path, None))}


def _cut(part: Raw, corpus: Corpus) -> Iterator[tuple[int | None, bytes]]:
    """Yield each document's line and raw bytes."""
    if part.line is None:
        yield None, part.content
    elif corpus.document_format == "chat" and part.path.suffix == PARQUET:
        yield from enumerate(rows_of(part.content, part.path), start=part.line)
    else:
        for number, line in enumerate(io.BytesIO(part.content), start=part.line):
            content = line.removesuffix(b"\n")
            # A line end of two bytes counts in part, as it did in every release.
            yield number, content if len(content) > corpus.max_document_bytes else content.removesuffix(b"\r")


def _document(
    raw: bytes, part: Raw, place: str, corpus: Corpus, template: ChatTemplate | None
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
    return Document(part.source, place, text, len(encoded), digest, chat)


def _text_in_json(line: str, text_field: str) -> str | SkipReason:
    record = parse_object(line)
    if isinstance(record, SkipReason):
        return record
    text = record.get(text_field)
    if isinstance(text, str):
        return text
    if _is_messages(text) or (text_field not in record and _is_messages(record.get("messages"))):
        return SkipReason.MESSAGES
    return SkipReason.NOT_TEXT if text_field in record else SkipReason.MISSING_FIELD


def _is_messages(value: Any) -> bool:
    """Tell whether a field holds the messages of a chat: objects with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)
