"""Read prepared tokens: one long memory-mapped stream, and where its documents begin."""

from pathlib import Path

import numpy as np
import torch

from elastic.config.sections import LongDocuments, Packed, PreparedData
from elastic.data.manifest import MASK_SUFFIX, REMEDY, DataError, checked_manifest
from elastic.data.packing import Packing, document_bounds, pack

DTYPES = ("uint16", "int32")
LONGER = "set data.long_documents=cut, or give documents of two tokens and more"


def open_split(data: PreparedData, split: str) -> "TokenStream":
    """Open a split of prepared data as the config says."""
    return TokenStream(Path(data.path) / split, data.packing, data.long_documents)


def num_packable(bounds: np.ndarray, sequence_length: int, long_documents: LongDocuments) -> int:
    """Count the documents between `bounds` that something can be learnt from at a length, where they are isolated."""
    places = np.diff(bounds) - 1
    return int(((places > 0) & ((places <= sequence_length) | (long_documents == "cut"))).sum())


class TokenStream:
    """The tokens of one split as a single memory-mapped stream, documents in file order, each ending in end-of-text.

    `prefix` is `<prepared folder>/train` or `.../validation`; `packing` (None: as the manifest says) and
    `long_documents` say how sequences are made of it. Raises DataError when a file is missing, truncated, swapped or
    altered, or the tokenizer is another: sizes and sampled checksums against data.json.
    """

    def __init__(
        self, prefix: str | Path, packing: Packed | None = None, long_documents: LongDocuments = "cut"
    ) -> None:
        self.prefix, self.long_documents = Path(prefix), long_documents
        self._packings: dict[tuple[int, int], Packing] = {}
        self.manifest = checked_manifest(self.prefix.parent, [self.prefix.name])
        self.packing = packing or self.manifest.packing
        if self.manifest.dtype not in DTYPES:
            raise DataError(f"{self.prefix}.bin: data.json says {self.manifest.dtype}, no type of token ids; {REMEDY}")
        self._tokens = np.asarray(np.memmap(f"{self.prefix}.bin", dtype=self.manifest.dtype, mode="r"))
        if self.num_tokens != self.manifest.splits[self.prefix.name].num_tokens:
            raise DataError(f"{self.prefix}.bin: holds {self.num_tokens:,} tokens, data.json says otherwise; {REMEDY}")
        self._counted = None
        if self.is_masked:
            self._counted = np.asarray(np.memmap(f"{self.prefix}{MASK_SUFFIX}", dtype=np.uint8, mode="r"))
            if len(self._counted) != -(-self.num_tokens // 8):
                raise DataError(f"{self.prefix}{MASK_SUFFIX}: holds no bit for every token; {REMEDY}")

    @property
    def in_words(self) -> str:
        """Say how sequences are made of the documents."""
        longer = "cut" if self.long_documents == "cut" else "left out"
        return f"isolated, longer documents {longer}" if self.packing == "isolated" else "concatenated"

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the stream holds."""
        return len(self._tokens)

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
        bounds = document_bounds(Path(f"{self.prefix}.idx"))
        if not len(bounds) or bounds[-1] != self.num_tokens:
            raise DataError(
                f"{self.prefix}.idx: its documents do not end where the {self.num_tokens:,} tokens do; {REMEDY}"
            )
        return bounds

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return tokens [count] from position `start`, int64."""
        assert start >= 0 and start + count <= self.num_tokens, f"tokens {start}..{start + count} are not in the stream"
        return torch.from_numpy(self._tokens[start : start + count].astype(np.int64))

    def counted(self, start: int, count: int) -> torch.Tensor:
        """Return which of the tokens [count] from position `start` the loss counts as labels, bool."""
        if self._counted is None:
            return torch.ones(count, dtype=torch.bool)
        first = start // 8
        bits = np.unpackbits(self._counted[first : -(-(start + count) // 8)], bitorder="little")
        return torch.from_numpy(bits[start - 8 * first :][:count].astype(bool))
