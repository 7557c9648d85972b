"""Write token ids as a Megatron indexed dataset, one document after the other."""

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


class IndexedWriter:
    """Write `<prefix>.bin` and, at the end of its `with` block, `<prefix>.idx`.

    Ids take two bytes for a vocabulary below 65,500 and four otherwise. The index of lengths is kept in memory until
    the end, about 150 bytes per document.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self.dtype: np.dtype = np.dtype(DType.optimal_dtype(vocab_size))
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype.type)
        self.num_documents = 0
        self.num_tokens = 0
        self.text_bytes = 0
        self.source_tokens: dict[str, int] = {}

    def add(self, ids: np.ndarray, text_bytes: int, source: str) -> None:
        """Append one document: `ids` [T] with its end-of-text id, the size of its text, the source it came from."""
        self._builder.add_document(ids, [len(ids)])
        self.num_documents += 1
        self.num_tokens += len(ids)
        self.text_bytes += text_bytes
        self.source_tokens[source] = self.source_tokens.get(source, 0) + len(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._builder.finalize(f"{self._prefix}.idx")
        else:
            self._builder.data_file.close()
