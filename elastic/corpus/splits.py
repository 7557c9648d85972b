"""Write the splits: token ids as Megatron indexed datasets, beside them the loss mask of chats."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from elastic.corpus.config import PrepareConfig
from elastic.corpus.workers import Borders, Encoded
from elastic.data.manifest import MASK_SUFFIX, SplitRecord, record_file

SUFFIXES = (".bin", ".idx", MASK_SUFFIX)


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
    borders: Borders,
    encoded: Iterable[tuple[bytes, Mapping[str, Encoded]]],
    dtype: np.dtype,
    aside: Path,
) -> tuple[bytes, dict[str, SplitRecord]]:
    """Write what the blocks of the corpus are encoded to; returns a hash of all documents' digests, and the splits.

    Writes Megatron indexed datasets, whose lengths are kept in memory until the end: about 150 bytes per document.
    """
    names = borders.splits
    digest, text_bytes, sources = hashlib.sha256(), Counter[str](), {name: Counter[str]() for name in names}
    masked = names if config.counted_part != "all" else ()
    with ExitStack() as stack:
        masks = {name: stack.enter_context(LossMask(aside / (name + MASK_SUFFIX))) for name in masked}
        writers = {name: IndexedDatasetBuilder(f"{aside / name}.bin", dtype.type) for name in names}
        for writer in writers.values():
            stack.enter_context(writer.data_file)
        for digests, splits in encoded:
            digest.update(digests)
            for name, part in splits.items():
                _add(writers[name], part)
                if part.counted is not None:
                    masks[name].add(part.counted)
                text_bytes[name] += part.text_bytes
                sources[name].update(part.sources)
        for name, writer in writers.items():
            writer.finalize(f"{aside / name}.idx")
    return digest.digest(), {
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


def _add(writer: IndexedDatasetBuilder, part: Encoded) -> None:
    """Do what the builder's `add_document` does, for all documents of a block at once."""
    writer.data_file.write(part.ids.tobytes())
    first = len(writer.sequence_lengths)
    writer.sequence_lengths.extend(part.lengths)
    writer.document_indices.extend(range(first + 1, first + len(part.lengths) + 1))
