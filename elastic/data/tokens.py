"""Read prepared tokens: one long memory-mapped stream, and where its documents begin."""

from pathlib import Path

import numpy as np
import torch

from elastic.config.sections import LongDocuments, Packed, PreparedData
from elastic.data.manifest import DataError, checked_manifest
from elastic.data.packing import Packing, pack
from elastic.data.pieces import Pieces
from elastic.space.ranges import DataChecks

LONGER = "set data.long_documents=cut, or give documents of two tokens and more"


def open_split(data: PreparedData, split: str) -> "TokenStream":
    """Open a split of prepared data as the config says."""
    return TokenStream(Path(data.path) / split, data.packing, data.long_documents, data.verify)


def num_packable(bounds: np.ndarray, sequence_length: int, long_documents: LongDocuments) -> int:
    """Count the documents between `bounds` that something can be learnt from at a length, where they are isolated."""
    places = np.diff(bounds) - 1
    return int(((places > 0) & ((places <= sequence_length) | (long_documents == "cut"))).sum())


class TokenStream:
    """The tokens of one split as a single memory-mapped stream, documents in file order, each ending in end-of-text.

    `prefix` is `<prepared folder>/train` or `.../validation`; `packing` (None: as the manifest says) and
    `long_documents` say how sequences are made of it. Raises DataError when a file is missing, truncated, swapped or
    altered, or the tokenizer is another: sizes and sampled checksums against data.json, or what `verify` says. The
    shards in a folder of shards are opened, and their samples compared, when they are first read.
    """

    def __init__(
        self,
        prefix: str | Path,
        packing: Packed | None = None,
        long_documents: LongDocuments = "cut",
        verify: DataChecks = "sampled",
    ) -> None:
        self.prefix, self.long_documents = Path(prefix), long_documents
        self._packings: dict[tuple[int, int], Packing] = {}
        self.manifest = checked_manifest(self.prefix.parent, [self.prefix.name], verify=verify)
        self.packing = packing or self.manifest.packing
        self._pieces = Pieces(self.prefix, self.manifest, checks=self.manifest.is_joined and verify == "sampled")

    @property
    def in_words(self) -> str:
        """Say how sequences are made of the documents."""
        longer = "cut" if self.long_documents == "cut" else "left out"
        return f"isolated, longer documents {longer}" if self.packing == "isolated" else "concatenated"

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the stream holds."""
        return self._pieces.num_tokens

    @property
    def is_masked(self) -> bool:
        """Tell whether the loss counts some of the tokens only."""
        return self.manifest.splits[self.prefix.name].num_counted is not None

    def packed(self, sequence_length: int, seed: int) -> Packing:
        """Return how the documents are packed, once for all phases of one length; raises DataError if none can be."""
        key = sequence_length, seed
        if key not in self._packings:
            found = pack(self.bounds(), *key, self.long_documents)
            if not len(found):
                raise DataError(f"sequence_length = {sequence_length}: {self.prefix}: {found}; {LONGER}")
            self._packings[key] = found
        return self._packings[key]

    def bounds(self) -> np.ndarray:
        """Return where the documents begin, and the last ends: positions [N + 1], from the index beside the tokens."""
        return self._pieces.bounds()

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return tokens [count] from position `start`, int64."""
        return torch.from_numpy(self._pieces.tokens(start, count).astype(np.int64))

    def counted(self, start: int, count: int) -> torch.Tensor:
        """Return which of the tokens [count] from position `start` the loss counts as labels, bool."""
        if not self.is_masked:
            return torch.ones(count, dtype=torch.bool)
        return torch.from_numpy(self._pieces.counted(start, count))
