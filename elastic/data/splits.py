"""Encode documents and write the splits: token ids as Megatron indexed datasets, beside them the loss mask of chats."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from elastic.data.chat import ChatError, ChatTemplate
from elastic.data.corpus import Document, read_documents
from elastic.data.corpus_files import Tally
from elastic.data.manifest import MASK_SUFFIX, DataError, SplitRecord, record_file
from elastic.data.prepare_config import PrepareConfig
from elastic.data.tokenizer import LoadedTokenizer

TRAIN = "train"
VALIDATION = "validation"
SUFFIXES = (".bin", ".idx", MASK_SUFFIX)
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 4096


class LossMask:
    """Appends to a file: a bit for every token, the lowest of a byte first, the last byte filled up with zeros."""

    def __init__(self, path: Path) -> None:
        self.num_counted = 0
        self._file = path.open("wb")
        self._rest = np.zeros(0, dtype=bool)

    def __enter__(self) -> "LossMask":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.write(np.packbits(self._rest, bitorder="little").tobytes())
        finally:
            self._file.close()

    def add(self, counted: np.ndarray) -> None:
        """Append the bits of some tokens, bool [n]."""
        self.num_counted += int(counted.sum())
        bits = np.concatenate([self._rest, counted])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]


def write_splits(
    config: PrepareConfig,
    threshold: int,
    digest: bytes,
    encoder: LoadedTokenizer | ChatTemplate,
    dtype: np.dtype,
    aside: Path,
) -> dict[str, SplitRecord]:
    """Read everything again, encode in bounded batches and write each document into its split.

    Writes Megatron indexed datasets, whose lengths are kept in memory until the end: about 150 bytes per document.
    Raises DataError if the documents are not those of the `digest` of the first reading.
    """
    names, tally = (TRAIN, VALIDATION) if threshold else (TRAIN,), Tally()
    text_bytes, sources = Counter[str](), {name: Counter[str]() for name in names}
    template = encoder if isinstance(encoder, ChatTemplate) else None
    masked = names if config.counted_part != "all" else ()
    with ExitStack() as stack:
        masks = {name: stack.enter_context(LossMask(aside / (name + MASK_SUFFIX))) for name in masked}
        writers = {name: IndexedDatasetBuilder(f"{aside / name}.bin", dtype.type) for name in names}
        for writer in writers.values():
            stack.enter_context(writer.data_file)
        for batch in _batches(read_documents(config, tally, template)):
            for document, (ids, counted) in zip(batch, encode(batch, encoder), strict=True):
                split = VALIDATION if document.split_position < threshold else TRAIN
                writers[split].add_document(ids, [len(ids)])
                if counted is not None:
                    masks[split].add(counted)
                text_bytes[split] += document.num_bytes
                sources[split][document.source] += len(ids)
        for name, writer in writers.items():
            writer.finalize(f"{aside / name}.idx")
    if tally.digest.digest() != digest:
        raise DataError(f"data: {', '.join(config.paths)} changed while it was read; start again when it is at rest")
    return {
        name: SplitRecord(
            num_documents=len(writer.sequence_lengths),
            num_tokens=sources[name].total(),
            text_bytes=text_bytes[name],
            files={
                name + suffix: record_file(aside / (name + suffix)) for suffix in (SUFFIXES if masks else SUFFIXES[:2])
            },
            sources=dict(sources[name]),
            num_counted=masks[name].num_counted if masks else None,
        )
        for name, writer in writers.items()
    }


def encode(
    documents: Sequence[Document], encoder: LoadedTokenizer | ChatTemplate
) -> Sequence[tuple[np.ndarray, np.ndarray | None]]:
    """Return the ids of each document, and which of them the loss counts, None for all."""
    if isinstance(encoder, LoadedTokenizer):
        return [(ids, None) for ids in encoder.encode_documents([document.text for document in documents])]
    try:
        return encoder.encode([document.chat for document in documents if document.chat is not None])
    except ChatError as error:
        raise DataError(f"{documents[error.index].place}: {error}") from error


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
