"""The vocabulary split over the ranks of a tensor-parallel group.

S sequence, B batch, D hidden, V vocabulary, v this rank's part of it, n tokens of one chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
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


def parallel_hidden(hidden: Tensor, sequence_parallel: bool, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Flatten [S, B, D] hidden states to [S * B, D] for a loss whose head is split over the vocabulary.

    With sequence parallelism, `hidden` is [S / tp, B, D] and is gathered. The backward pass sums the ranks' partial
    gradients (all-reduce, or reduce-scatter with sequence parallelism), which is what `distillation_loss` needs.
    Token (s, b) lands in row s * B + b: labels [B, S] must be given as `labels.t().reshape(-1)`.
    """
    if tp_group is not None and tp_group.size() > 1:
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    return hidden.flatten(0, 1)
