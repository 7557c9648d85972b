"""Read the tokens of a split as one array, of one folder or of all its shards; files are opened when first read."""

from bisect import bisect_right
from functools import cached_property
from pathlib import Path

import numpy as np

from elastic.data.manifest import MASK_SUFFIX, REMEDY, DataError, Manifest, content_problem
from elastic.data.packing import document_bounds

DTYPES = ("uint16", "int32")


class Piece:
    """Tokens of one `.bin` and the files beside it, memory-mapped when they are first read.

    `first` is the position of its first token in the split. With `checks` the first reading compares sampled checksums
    and raises DataError where they are others.
    """

    def __init__(self, prefix: Path, first: int, num_tokens: int, manifest: Manifest, *, checks: bool) -> None:
        self.prefix, self.first, self.num_tokens = prefix, first, num_tokens
        self._manifest, self._checks = manifest, checks

    @cached_property
    def tokens(self) -> np.ndarray:
        """Return the ids [num_tokens]."""
        return self._mapped(".bin", self._manifest.dtype)

    @cached_property
    def bits(self) -> np.ndarray:
        """Return the loss mask, uint8, a bit for every token."""
        return self._mapped(MASK_SUFFIX, "uint8")

    def _mapped(self, suffix: str, dtype: str) -> np.ndarray:
        if self._checks:
            name = f"{self.prefix.parent.name}/{self.prefix.name}{suffix}"
            record = self._manifest.splits[self.prefix.name].files[name]
            if problem := content_problem(Path(f"{self.prefix}{suffix}"), record, full=False):
                raise DataError(f"{self.prefix}{suffix} {problem}; restore it or {REMEDY}")
        return np.asarray(np.memmap(f"{self.prefix}{suffix}", dtype=dtype, mode="r"))

    def counted(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens from `start` to before `stop` in the piece the loss counts, bool."""
        first = start // 8
        bits = np.unpackbits(self.bits[first : -(-stop // 8)], bitorder="little")
        return bits[start - 8 * first :][: stop - start].astype(bool)


class Pieces:
    """The tokens of the split at `prefix` = `<folder>/<split>`, all pieces behind each other, as its manifest says.

    `checks` as for Piece. Raises DataError when the manifest does not fit the files' sizes.
    """

    def __init__(self, prefix: Path, manifest: Manifest, *, checks: bool) -> None:
        if manifest.dtype not in DTYPES:
            raise DataError(f"{prefix}.bin: data.json says {manifest.dtype}, no type of token ids; {REMEDY}")
        split, self.num_tokens, self._pieces = manifest.splits[prefix.name], 0, list[Piece]()
        for name, record in split.files.items():
            if name.endswith(".bin") and record.size_bytes:
                num_tokens = record.size_bytes // np.dtype(manifest.dtype).itemsize
                piece = prefix.parent / name.removesuffix(".bin")
                mask = split.files.get(name.removesuffix(".bin") + MASK_SUFFIX)
                if split.num_counted is not None and (mask is None or mask.size_bytes != -(-num_tokens // 8)):
                    raise DataError(f"{piece}{MASK_SUFFIX}: holds no bit for every token; {REMEDY}")
                self._pieces.append(Piece(piece, self.num_tokens, num_tokens, manifest, checks=checks))
                self.num_tokens += num_tokens
        if self.num_tokens != split.num_tokens:
            raise DataError(f"{prefix}.bin: holds {self.num_tokens:,} tokens, data.json says otherwise; {REMEDY}")
        self._firsts = [piece.first for piece in self._pieces]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Return the ids [count] from position `start`."""
        return np.concatenate([piece.tokens[first:stop] for piece, first, stop in self._parts(start, count)])

    def counted(self, start: int, count: int) -> np.ndarray:
        """Return which of the tokens [count] from position `start` the loss counts, bool."""
        return np.concatenate([piece.counted(first, stop) for piece, first, stop in self._parts(start, count)])

    def _parts(self, start: int, count: int) -> list[tuple[Piece, int, int]]:
        """Return the pieces that hold the tokens, each with the part of it that is asked for."""
        assert start >= 0 and count >= 1 and start + count <= self.num_tokens, f"no tokens {start}..{start + count}"
        parts, number = [], bisect_right(self._firsts, start) - 1
        while count:
            piece = self._pieces[number]
            first = start - piece.first
            stop = min(first + count, piece.num_tokens)
            parts.append((piece, first, stop))
            start, count, number = start + stop - first, count - (stop - first), number + 1
        return parts

    def bounds(self) -> np.ndarray:
        """Return where the documents begin, and the last ends: positions [N + 1], from the indices."""
        bounds = [np.zeros(1, np.int64)]
        for piece in self._pieces:
            found = document_bounds(Path(f"{piece.prefix}.idx"))
            if not len(found) or found[-1] != piece.num_tokens:
                rule = f"its documents do not end where the {piece.num_tokens:,} tokens do"
                raise DataError(f"{piece.prefix}.idx: {rule}; {REMEDY}")
            bounds.append(found[1:] + piece.first)
        return np.concatenate(bounds)
