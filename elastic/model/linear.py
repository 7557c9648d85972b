"""Tensor-parallel linears that compute only the nested part of their weight.

For a few tokens without a copy of what is kept: a product then reads every weight once, so gathering the kept rows
first would cost more than the product itself. The kept part is a few strided grids instead, and each is one batched
product on a view.

Shapes: S sequence, B batch; T tokens, R rows and C columns of this rank's weight, r and c of them kept, b matrices of m
rows in a batch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from elastic.space.layers import DimKind
from elastic.space.nesting import Cut, Grid, take

# Up to here an inference product leaves the weight where it lies; beyond, one copy of the kept part pays off.
FEW_TOKENS = 8


def _is_short_inference(x: Tensor) -> bool:
    """Tell whether `x` [S, B, ...] holds few tokens and nothing is differentiated: a step of decoding."""
    return x.shape[0] * x.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()


class _NestedWeight:
    """A weight of which a layer uses a part: `hidden_dim` is the stream, `inner` says what its other dimension is."""

    hidden_dim: int
    weight: Tensor
    _forward_impl: Callable[..., Tensor]

    def __init__(self, *args: Any, inner: DimKind, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inner = inner

    def stream_part(self, cut: Cut) -> Tensor:
        """Return this rank's weight cut to the stream's width: a view."""
        return take(self.weight, self.hidden_dim, cut.grid(DimKind.HIDDEN))

    def kept_weight(self, cut: Cut) -> Tensor:
        """Return the part of this rank's weight that a cut computes with: [kept rows, kept columns]."""
        return take(self.stream_part(cut), 1 - self.hidden_dim, cut.grid(self.inner))

    def product(self, x: Tensor, cut: Cut, **exchanges: Any) -> Tensor:
        """Map [..., kept columns] to [..., kept rows] as Megatron-Core does, with its exchanges between ranks."""
        weight = self.kept_weight(cut)
        return self._forward_impl(input=x, weight=weight, bias=None, gradient_accumulation_fusion=False, **exchanges)


class ElasticColumnParallelLinear(_NestedWeight, tensor_parallel.ColumnParallelLinear):
    """Y = X W^T from the stream, rows of W sharded."""

    hidden_dim = 1

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S(/tp), B, kept columns] to [S, B, kept rows of this rank]."""
        if _is_short_inference(x) and not self.sequence_parallel:
            y = product_with_rows(x.flatten(0, 1), self.stream_part(cut), cut.grid(self.inner))
            return y.unflatten(0, x.shape[:2])
        exchanges = dict(allreduce_dgrad=self.allreduce_dgrad, sequence_parallel=self.sequence_parallel)
        return self.product(x, cut, tp_group=self.tp_group, **exchanges)


class ElasticRowParallelLinear(_NestedWeight, tensor_parallel.RowParallelLinear):
    """Y = X W^T to the stream, columns of W sharded; the sum over ranks is part of it."""

    hidden_dim = 0

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S, B, kept columns of this rank] to [S(/tp), B, kept rows]."""
        if _is_short_inference(x):
            y = product_with_columns(x.flatten(0, 1), self.stream_part(cut), cut.grid(self.inner))
            partial = y.unflatten(0, x.shape[:2])
        else:
            partial = self.product(x, cut, tp_group=None, allreduce_dgrad=False, sequence_parallel=False)
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)


@dataclass(frozen=True)
class _Strip:
    """One block's kept rows as a view [b, m, C], m in runs of `full` rows of which the first `kept` count.

    A batch has one stride, so of two directions that are both cut (heads of a group, channels of a head) the inner one
    is computed whole: one product that does a little more is faster than many small ones.
    """

    view: Tensor
    full: int = 1
    kept: int = 1


def product_with_rows(x: Tensor, weight: Tensor, rows: Grid) -> Tensor:
    """Map x [T, C] to [T, r] with the kept rows of `weight` [R, C]."""
    if rows.is_whole:
        return x @ weight.t()
    parts = []
    for strip in _strips(weight, rows):
        y = torch.bmm(x.expand(len(strip.view), -1, -1), strip.view.mT)  # [b, T, m]
        runs = y.transpose(0, 1).unflatten(2, (-1, strip.full))[..., : strip.kept]
        parts.append(runs.reshape(x.shape[0], rows.outer, -1))
    return torch.cat(parts, dim=2).flatten(1)


def product_with_columns(x: Tensor, weight: Tensor, columns: Grid) -> Tensor:
    """Map x [T, c] to [T, R] with the kept columns of `weight` [R, C]."""
    if columns.is_whole:
        return x @ weight.t()
    sizes = [math.prod(block.kept) for block in columns.blocks]
    by_block = x.unflatten(1, (columns.outer, -1)).split(sizes, dim=2)
    total = x.new_zeros(x.shape[0], weight.shape[0])
    for strip, own in zip(_strips(weight.t(), columns), by_block, strict=True):
        runs = own.reshape(x.shape[0], len(strip.view), -1, strip.kept)
        rows = F.pad(runs, (0, strip.full - strip.kept)).flatten(2).transpose(0, 1)  # [b, T, m]
        total += torch.bmm(rows, strip.view).sum(dim=0)
    return total


def _strips(weight: Tensor, layout: Grid) -> Iterator[_Strip]:
    """Yield the kept part of dimension 0 of `weight`, block by block."""
    sizes = [math.prod(block.full) for block in layout.blocks]
    for block, part in zip(layout.blocks, weight.unflatten(0, (layout.outer, -1)).split(sizes, dim=1), strict=True):
        # Directions as (full, kept); one that is whole lies side by side with the one around it.
        directions: list[tuple[int, int]] = []
        for full, kept in zip(block.full, block.kept, strict=True):
            if directions and full == kept:
                around = directions.pop()
                full, kept = around[0] * full, around[1] * kept
            directions.append((full, kept))
        if layout.outer > 1 or len(directions) == 1 or directions[0][0] != directions[0][1]:
            directions.insert(0, (layout.outer, layout.outer))
        assert len(directions) <= 3, "nobody lays out a grid that is cut in three directions"
        (batch, _), (full, kept), *inner = directions
        run = inner[0] if inner else (1, 1)
        yield _Strip(part.view(batch, full * run[0], -1)[:, : kept * run[0]], *run)
