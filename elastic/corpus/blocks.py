"""Read a corpus as raw blocks, cut between documents, for whoever makes documents of them."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from elastic.corpus.containers import COMPRESSED_SUFFIXES, PARQUET, open_lines, parquet_batches
from elastic.corpus.conversation import COLUMNS
from elastic.corpus.files import Corpus, CorpusFile, SkipReason, Tally, find_files, place_of
from elastic.data.manifest import SkipRecord
from elastic.data.shards import WHOLE, Shard

BLOCK_BYTES = 1 << 20
BLOCK_PARTS = 4096
READ_BYTES = 1 << 18  # Python takes what is asked for, however little there is
DRAIN_BYTES = 1 << 20
# How files begin that would otherwise be counted as thousands of bad lines: gzip, zstd, xz, zip, bzip2; UTF-16 marks.
BZIP2 = [b"BZh%d1AY&SY" % level for level in range(1, 10)]
COMPRESSED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"PK\x03\x04", *BZIP2)
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

type Passed = dict[str, SkipRecord]  # what was left out, by reason


@dataclass(frozen=True)
class Raw:
    """Bytes of one file: all of it (`line` is None), whole lines, or rows of parquet, of which the first is `line`.

    `source` is the configured path the file was found under; lines are counted from byte `origin`.
    """

    source: str
    path: Path
    line: int | None
    content: bytes
    origin: int = 0

    def place(self, line: int | None) -> str:
        """Write where a document begins."""
        return place_of(self.path, line) + (f" from byte {self.origin}" if self.origin else "")


type Block = list[Raw | Passed]


def read_blocks(corpus: Corpus, shard: Shard = WHOLE, total_bytes: int = 0) -> Iterator[Block]:
    """Yield `corpus`, or a shard of its `total_bytes`, in its order and in blocks of about BLOCK_BYTES.

    Holds one block in memory, and a document that is larger. What the folders hold beside the corpus is counted by the
    first shard.
    """
    block: Block = []
    size_bytes = first = 0
    walk = Tally()
    for file in find_files(corpus, walk):
        if walk.skipped and shard.number == 1:
            block.append(walk.skipped)
        walk.skipped = {}
        share = shard.share(first, file.size_bytes, total_bytes, is_cut=is_cut(file, corpus))
        first += file.size_bytes
        for part in () if share is None else _parts(file, corpus, *share):
            block.append(part)
            size_bytes += len(part.content) if isinstance(part, Raw) else 0
            if size_bytes >= BLOCK_BYTES or len(block) >= BLOCK_PARTS:
                yield block
                block, size_bytes = [], 0
    if walk.skipped and shard.number == 1:
        block.append(walk.skipped)
    if block:
        yield block


def empty_shards(corpus: Corpus, of: int, total_bytes: int) -> list[int]:
    """Return which of `of` shards would hold no byte of the corpus."""
    empty, first = set(range(1, of + 1)), 0
    for file in find_files(corpus, Tally()):
        if file.size_bytes:
            low, high = (place * of // total_bytes for place in (first, first + file.size_bytes - 1))
            is_whole = not is_cut(file, corpus)
            # By division to within one; `share` says exactly.
            near = range(max(low, 1), min(low + 2, of) + 1) if is_whole else range(max(low, 1), min(high + 2, of) + 1)
            for number in empty.intersection(near):
                if Shard(number, of).share(first, file.size_bytes, total_bytes, is_cut=not is_whole) is not None:
                    empty.discard(number)
        first += file.size_bytes
    return sorted(empty)


def is_cut(file: CorpusFile, corpus: Corpus) -> bool:
    """Tell whether a file holds lines that begin at any byte."""
    packed = corpus.document_format == "chat" and file.path.suffix in (*COMPRESSED_SUFFIXES, PARQUET)
    return corpus.document_format != "text" and not packed


def _parts(file: CorpusFile, corpus: Corpus, start: int, end: int) -> Iterator[Raw | Passed]:
    """Yield the parts of a file; of one that is cut those lines that begin from byte `start` to before `end`."""
    limit, line = corpus.max_document_bytes, 1
    try:
        if corpus.document_format == "text":
            content = _whole_file(file, limit)
            yield _skip(content, file.path) if isinstance(content, SkipReason) else _raw(file, None, content)
        elif corpus.document_format == "chat" and file.path.suffix == PARQUET:
            for num_rows, batch in parquet_batches(file.path, COLUMNS):
                yield _raw(file, line, batch)
                line += num_rows
        else:
            is_packed = not is_cut(file, corpus)
            with open_lines(file.path) if is_packed else file.path.open("rb") as stream:
                if reason := _no_plain_text(stream.peek(max(map(len, COMPRESSED)))):
                    if start == 0:
                        yield _skip(reason, file.path)
                    return
                if start:
                    stream.seek(start - 1)
                    start += _drain(stream) - 1
                for line, lines in _lines(stream, limit, None if end == file.size_bytes or is_packed else end - start):
                    if isinstance(lines, SkipReason):
                        yield _skip(lines, file.path, line)
                    else:
                        yield _raw(file, line, lines, start)
    except OSError:
        yield _skip(SkipReason.UNREADABLE, file.path)


def _raw(file: CorpusFile, line: int | None, content: bytes, origin: int = 0) -> Raw:
    return Raw(file.source, file.path, line, content, origin)


def _skip(reason: SkipReason, path: Path, line: int | None = None) -> Passed:
    return {reason: SkipRecord(1, place_of(path, line))}


def _whole_file(file: CorpusFile, limit: int) -> bytes | SkipReason:
    if file.size_bytes > limit:
        return SkipReason.TOO_LARGE
    with file.path.open("rb") as stream:
        content = stream.read(file.size_bytes + 1)  # one more, so that a file that grows is noticed
    if len(content) != file.size_bytes:
        return SkipReason.CHANGED
    return _no_plain_text(content) or content


def _lines(
    stream: "BufferedReader[Any]", limit: int, size_bytes: int | None
) -> Iterator[tuple[int, bytes | SkipReason]]:
    """Yield the lines that begin within the next `size_bytes` (None: all), many at a time, with the first's number.

    What was read before an error is given out first.
    """
    number, failure, left = 1, None, size_bytes
    while failure is None and (left is None or left > 0):
        block, failure = _read(stream, BLOCK_BYTES if left is None else min(left, BLOCK_BYTES))
        rest = b""
        try:
            if failure is None and block and not block.endswith(b"\n"):
                rest = stream.readline(limit + 1)
        except OSError as error:
            failure = error
        if not block and failure is None:
            return
        is_endless = len(rest) > limit and not rest.endswith(b"\n")
        whole = block[: block.rfind(b"\n") + 1] if is_endless or failure is not None else block + rest
        if whole:
            yield number, whole
        number += whole.count(b"\n")
        drained = 0
        if is_endless:
            drained = _drain(stream)
            yield number, SkipReason.TOO_LARGE
            number += 1
        left = None if left is None else left - len(block) - len(rest) - drained
    if failure is not None:
        raise failure


def _read(stream: "BufferedReader[Any]", size_bytes: int) -> tuple[bytes, OSError | None]:
    """Read so much, or what comes before the end or an error."""
    parts: list[bytes] = []
    try:
        while size_bytes > 0 and (part := stream.read1(min(size_bytes, READ_BYTES))):
            parts.append(part)
            size_bytes -= len(part)
    except OSError as error:
        return b"".join(parts), error
    return b"".join(parts), None


def _drain(stream: "BufferedReader[Any]") -> int:
    """Drop the rest of a line in small pieces, so that its size never matters; returns how many bytes that was."""
    num_bytes = 0
    while rest := stream.readline(DRAIN_BYTES):
        num_bytes += len(rest)
        if rest.endswith(b"\n"):
            break
    return num_bytes


def _no_plain_text(start: bytes) -> SkipReason | None:
    """Say why a file that begins so is no plain text, None if it may be."""
    if start.startswith(COMPRESSED):
        return SkipReason.COMPRESSED
    return SkipReason.UTF16 if start.startswith(UTF16) else None
