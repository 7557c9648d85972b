"""Order samples: a permutation of the chunks for every epoch, computed per sample and never stored."""

import hashlib
import math
import struct
from dataclasses import dataclass

import numpy as np

NUM_ROUNDS = 8
_MASK = (1 << 64) - 1


def mixed_seed(seed: int, *salts: int) -> int:
    """Derive a 63-bit seed from a seed and salts (phase, sequence length); different salts are unrelated streams."""
    text = ":".join(str(part) for part in (seed, *salts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"elastic-salts").digest()) >> 1


@dataclass(frozen=True)
class SampleOrder:
    """Map an unbounded sample index to a chunk: every epoch of `num_chunks` indices visits every chunk once.

    A Feistel network over a grid of rows x columns >= num_chunks cells, keyed by (seed, epoch, num_chunks); cells
    beyond the last chunk are sent round again until they land inside. It is a pure function of its fields and the
    index, so resuming, or asking from another number of ranks, needs no state.
    """

    num_chunks: int
    seed: int

    def chunk(self, sample_index: int) -> int:
        """Return the chunk, 0..num_chunks-1, that sample `sample_index` >= 0 reads."""
        assert self.num_chunks >= 1 and sample_index >= 0
        epoch, index = divmod(sample_index, self.num_chunks)
        text = f"{self.seed}:{epoch}:{self.num_chunks}"
        digest = hashlib.blake2b(text.encode(), digest_size=8 * NUM_ROUNDS, person=b"elastic-order").digest()
        keys = struct.unpack(f"<{NUM_ROUNDS}Q", digest)
        rows = math.isqrt(self.num_chunks - 1) + 1
        columns = -(-self.num_chunks // rows)
        index = _permute(index, rows, columns, keys)
        while index >= self.num_chunks:
            index = _permute(index, rows, columns, keys)
        return index


def _permute(index: int, rows: int, columns: int, keys: tuple[int, ...]) -> int:
    """Permute 0..rows*columns-1: each round shifts one coordinate by a keyed hash of the other, which is invertible."""
    column, row = divmod(index, rows)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            row = (row + hashed(key, column)) % rows
        else:
            column = (column + hashed(key, row)) % columns
    return column * rows + row


def hashed[T: (int, np.ndarray)](key: int, value: T) -> T:
    """Mix a value, or each of an array of uint64, and a key into 64 bits (the finalizer of splitmix64)."""
    mixed = (key + value * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
