"""Pack whole documents into sequences, best fit first, over a histogram of their lengths.

A document of n tokens takes n - 1 places of a sequence: its last token follows nothing but a label, and what would
follow it stands in another document. So every token of a document but its first is a label, once, and no place is lost.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elastic.config.sections import LongDocuments
from elastic.data.manifest import REMEDY, DataError
from elastic.data.order import hashed

INDEX_MAGIC = b"MMIDIDX\x00\x00"  # of Megatron's indexed datasets, before version, type and two counts
INDEX_HEADER_BYTES = 34
LENGTH_SHIFT = 40  # a key to sort by: 24 bits of length (space/ranges.py), then 40 of chance


@dataclass(frozen=True)
class Packing:
    """Which pieces of documents stand in which sequence: those of sequence i are first_piece[i] .. first_piece[i+1]-1.

    A piece is the places [starts[p], starts[p] + lengths[p]) of the stream of tokens; its labels end one further. Takes
    12 bytes for every piece and 8 for every sequence. `num_long` documents did not fit into one sequence, and were cut
    or left out; `num_bare` are a single token, which nothing can be learnt from, and left out.
    """

    sequence_length: int
    starts: np.ndarray
    lengths: np.ndarray
    first_piece: np.ndarray
    num_documents: int
    num_long: int
    num_bare: int
    long_documents: LongDocuments

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.first_piece) - 1

    @property
    def fill(self) -> float:
        """Return the share of all places that hold a token of a document."""
        return float(self.lengths.sum(dtype=np.int64)) / max(1, len(self) * self.sequence_length)

    def filled(self, sequence: int) -> int:
        """Return how many places of a sequence hold a token of a document."""
        return int(self.lengths[self.first_piece[sequence] : self.first_piece[sequence + 1]].sum())

    def pieces(self, sequence: int) -> list[tuple[int, int]]:
        """Return (start, length) of a sequence's pieces, longest first."""
        part = slice(self.first_piece[sequence], self.first_piece[sequence + 1])
        return list(zip(self.starts[part].tolist(), self.lengths[part].tolist(), strict=True))

    def __str__(self) -> str:
        text = f"{self.num_documents:,} documents in {len(self):,} sequences of {self.sequence_length:,} tokens"
        done = "cut" if self.long_documents == "cut" else "left out"
        long = f", {self.num_long:,} longer ones {done}" if self.num_long else ""
        bare = f", {self.num_bare:,} of a single token left out" if self.num_bare else ""
        return f"{text}, {self.fill:.2%} full{long}{bare}"


def document_bounds(path: Path, remedy: str = REMEDY) -> np.ndarray:
    """Return the positions [N + 1] int64 at which the documents of a Megatron index (`.idx`) begin, and the last ends.

    Raises DataError where the file is no index, is cut off, or has documents that do not follow each other.
    """
    with path.open("rb") as file:
        header = file.read(INDEX_HEADER_BYTES)
    if len(header) < INDEX_HEADER_BYTES or not header.startswith(INDEX_MAGIC):
        raise DataError(f"{path}: is no index of a Megatron dataset; {remedy}")
    num_sequences, num_bounds = np.frombuffer(header, np.int64, 2, offset=INDEX_HEADER_BYTES - 16).tolist()
    size = INDEX_HEADER_BYTES + 12 * num_sequences + 8 * num_bounds  # lengths, positions in bytes, documents
    if min(num_sequences, num_bounds) < 0 or path.stat().st_size < size:
        raise DataError(f"{path}: is cut off, {num_sequences:,} sequences need {size:,} bytes; {remedy}")
    whole = np.memmap(path, mode="r")
    lengths = whole[INDEX_HEADER_BYTES:][: 4 * num_sequences].view(np.int32)
    documents = whole[size - 8 * num_bounds : size].view(np.int64)
    in_turn = not (documents[1:] < documents[:-1]).any() and lengths.min(initial=0) >= 0
    if not in_turn or documents[:1].any() or documents[-1:].max(initial=0) > num_sequences:
        rule = f"its documents do not follow each other from its first to the last of {num_sequences:,} sequences"
        raise DataError(f"{path}: {rule}; {remedy}")
    ends = np.zeros(num_sequences + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends[documents]


def pack(bounds: np.ndarray, sequence_length: int, seed: int, long_documents: LongDocuments = "cut") -> Packing:
    """Pack the documents between `bounds` [N + 1], a pure function of the arguments.

    Best fit decreasing: from the longest piece down, each goes where the least room is left that still holds it. Which
    of the pieces of one length goes where is drawn from `seed`. Cut documents are pieces of S places and a rest, each a
    document of its own; a piece's last label is the first token of the next. About 150 bytes for every piece while it
    runs.
    """
    places = np.diff(bounds) - 1
    is_long = places > sequence_length
    taken = places > 0
    num_long, num_bare = int(is_long.sum()), int(len(places) - taken.sum())
    if long_documents == "leave_out":
        taken &= ~is_long
    starts, places = bounds[:-1][taken], places[taken]
    num_documents = len(places)
    counts = -(-places // sequence_length)
    if num_documents < counts.sum():
        place_in_document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(starts, counts) + place_in_document * sequence_length
        places = np.minimum(np.repeat(places, counts) - place_in_document * sequence_length, sequence_length)
    chance = hashed(seed, np.arange(len(places), dtype=np.uint64)) >> np.uint64(64 - LENGTH_SHIFT)
    longest_first = np.argsort(
        (sequence_length - places).astype(np.uint64) << np.uint64(LENGTH_SHIFT) | chance, kind="stable"
    )
    sequences = _sequences_of(best_fit(np.bincount(places, minlength=sequence_length + 1).tolist()))
    order = longest_first[np.argsort(sequences, kind="stable")]
    first_piece = np.concatenate([[0], np.cumsum(np.bincount(sequences))])
    lengths = places[order].astype(np.int32)
    told = (num_documents, num_long, num_bare, long_documents)
    return Packing(sequence_length, starts[order], lengths, first_piece, *told)


def best_fit(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Place `counts[n]` pieces of every length n, longest first; the last entry is that of the whole sequence's length.

    Returns (first, num_sequences, pieces in each) in the order of the pieces: of neighbours with the same room all are
    treated at once, so the work grows with the number of different lengths rather than of documents.
    """
    whole, num_sequences = len(counts) - 1, 0
    placed: list[tuple[int, int, int]] = []
    rooms: list[int] = []  # that are left in some sequence, ascending
    ranges: dict[int, list[tuple[int, int]]] = {}  # room -> (first, number) of sequences with that much

    def leave(room: int, first: int, number: int) -> None:
        if room and number:
            if room not in ranges:
                insort(rooms, room)
            ranges.setdefault(room, []).append((first, number))

    for length in range(whole, 0, -1):
        left = counts[length]
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                first, number = ranges[room].pop()
                if not ranges[room]:
                    del ranges[room], rooms[at]
            else:
                room, first, number = whole, num_sequences, -(-left // (whole // length))
                num_sequences += number
            most = room // length
            full = min(number, left // most)
            rest = left - full * most if full < number else 0
            for pieces, begin, size in ((most, first, full), (rest, first + full, int(rest > 0))):
                if size:
                    placed.append((begin, size, pieces))
                    leave(room - pieces * length, begin, size)
                    left -= size * pieces
            used = full + int(rest > 0)
            leave(room, first + used, number - used)
    return placed


def _sequences_of(placed: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Write out the sequence of every piece, in the order of the pieces."""
    first, number, pieces = np.array(placed, np.int64).reshape(-1, 3).T
    sizes = number * pieces
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(first, sizes) + within // np.repeat(pieces, sizes)
