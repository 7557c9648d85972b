"""The vocabulary split over the ranks of a tensor-parallel group.

V vocabulary, v this rank's part of it, n tokens of one chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Ids [start, start + size) of `total`; equal parts in rank order, as Megatron-Core deals them."""

    start: int
    size: int
    total: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, size: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """Describe this rank's part, given its number of rows."""
        num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        return cls(rank * size, size, num_ranks * size, group if num_ranks > 1 else None)

    def reduce(self, rows: Sequence[Tensor], op: dist.ReduceOp.RedOpType) -> tuple[Tensor, ...]:
        """Combine [n] tensors over the ranks with a single collective."""
        if self.group is None:
            return tuple(rows)
        stacked = torch.stack(list(rows))
        dist.all_reduce(stacked, op=op, group=self.group)
        return stacked.unbind()

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return global ids [n] as local rows (0 where another rank has them) and whether they are here."""
        local = labels.long() - self.start
        here = (local >= 0) & (local < self.size)
        return local.where(here, 0), here
