"""Documents that share a sequence and do not see each other, in the forms that attention, convolution and scan need.

Shapes: B batch, S sequence. A document's tokens stand in one row, in order; under context parallelism a rank holds
pieces of it, which see the document's earlier tokens, whatever rank holds them.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


def copied(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, and wait for nothing: what is not pinned first waits for a GPU."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def context_spans(length: int, cp_rank: int, cp_size: int) -> tuple[tuple[int, int], ...]:
    """Return from where to where the tokens of one context-parallel rank stand in whole sequences of `length`.

    Megatron-Core's load balancing: of 2 * cp_size equal chunks a rank holds chunk r and chunk 2 * cp_size - 1 - r.
    """
    if cp_size == 1:
        return ((0, length),)
    half = length // (2 * cp_size)
    return tuple((chunk * half, (chunk + 1) * half) for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank))


@dataclass(frozen=True)
class Piece:
    """Queries of one document that follow each other on this rank: they see its first `num_keys` tokens, causally."""

    document: int  # counted over all rows
    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class PackedPieces:
    """What a variable-length kernel asks for: where the queries and the keys of each piece end, int32 [pieces + 1].

    `key_rows` says which of the B * S tokens the keys of the pieces are, one piece after another; None: just those.
    """

    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    key_rows: Tensor | None


@dataclass(frozen=True)
class Documents:
    """The documents of one micro-batch.

    `positions` [B, S] is each token's place in its document and `numbers` [B, S] its document's in the row, both int32
    on the model's device. `lengths` are the documents' over all rows. `pieces` hold this rank's tokens row by row.
    """

    positions: Tensor
    numbers: Tensor
    lengths: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(
        cls, positions: Tensor | None, device: torch.device, cp_rank: int = 0, cp_size: int = 1
    ) -> "Documents | None":
        """Read `positions` [B, S] on the CPU, whole sequences on every rank; None if each is one document."""
        if positions is None:
            return None
        assert positions.device.type == "cpu", "where documents start shapes the work: the host has to know"
        starts = positions == 0
        before = torch.cat([torch.full_like(positions[:, :1], -1), positions[:, :-1]], dim=1)
        assert bool((starts | (positions == before + 1)).all()) and bool(starts[:, 0].all()), "positions have a gap"
        if int(starts.sum()) == len(positions):
            return None
        lengths, pieces = list[int](), list[Piece]()
        spans = context_spans(positions.shape[1], cp_rank, cp_size)
        for row in starts:
            firsts = row.nonzero().flatten().tolist()
            documents = list(zip(firsts, [*firsts[1:], len(row)], strict=True))
            for lower, upper in spans:
                for number, (first, end) in enumerate(documents, start=len(lengths)):
                    own_first, own_end = max(first, lower), min(end, upper)
                    if own_first < own_end:
                        pieces.append(Piece(number, own_end - own_first, own_end - first))
            lengths += [end - first for first, end in documents]
        numbers = starts.cumsum(1) - 1
        both = copied(torch.stack([positions.int(), numbers.int()]), device)
        return cls(both[0], both[1], tuple(lengths), tuple(pieces))

    @cached_property
    def packed(self) -> PackedPieces:
        """Return the pieces for a variable-length kernel, put on the device once for all layers."""
        num_queries, num_keys = zip(*((piece.num_queries, piece.num_keys) for piece in self.pieces), strict=True)
        ends = torch.tensor([[0, *accumulate(num_queries)], [0, *accumulate(num_keys)]], dtype=torch.int32)
        key_rows, device = None, self.positions.device
        if num_queries != num_keys:
            firsts = [0, *accumulate(self.lengths)]
            runs = [torch.arange(piece.num_keys) + firsts[piece.document] for piece in self.pieces]
            key_rows = copied(torch.cat(runs), device)
        query_ends, key_ends = copied(ends, device)
        return PackedPieces(query_ends, key_ends, max(num_queries), max(num_keys), key_rows)
