"""Tensor-parallel linears that compute only the nested part of their weight."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from elastic.model.nested_product import product_with_columns, product_with_rows
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut, take

# Up to here an inference product leaves the weight where it lies; beyond, one copy of the kept part pays off.
FEW_TOKENS = 8


def _is_short_inference(x: Tensor) -> bool:
    """Tell whether `x` [S, B, ...] holds few tokens and nothing is differentiated: a step of decoding."""
    return x.shape[0] * x.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()


class _NestedWeight:
    """A weight of which a layer uses a part: `hidden_dim` is the stream, `inner` says what its other dimension is."""

    hidden_dim: int
    weight: Tensor

    def __init__(self, *args: Any, inner: DimKind, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inner = inner

    def stream_part(self, cut: Cut) -> Tensor:
        """Return this rank's weight cut to the stream's width: a view."""
        return take(self.weight, self.hidden_dim, cut.grid(DimKind.HIDDEN))

    def kept_weight(self, cut: Cut) -> Tensor:
        """Return the part of this rank's weight that a cut computes with: [kept rows, kept columns]."""
        return take(self.stream_part(cut), 1 - self.hidden_dim, cut.grid(self.inner))


class ElasticColumnParallelLinear(_NestedWeight, ColumnParallelLinear):
    """Y = X W^T from the stream, rows of W sharded."""

    hidden_dim = 1

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S(/tp), B, kept columns] to [S, B, kept rows of this rank]."""
        if _is_short_inference(x) and not self.sequence_parallel:
            y = product_with_rows(x.flatten(0, 1), self.stream_part(cut), cut.grid(self.inner))
            return y.unflatten(0, x.shape[:2])
        return self._forward_impl(
            input=x,
            weight=self.kept_weight(cut),
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )


class ElasticRowParallelLinear(_NestedWeight, RowParallelLinear):
    """Y = X W^T to the stream, columns of W sharded; the sum over ranks is part of it."""

    hidden_dim = 0

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S, B, kept columns of this rank] to [S(/tp), B, kept rows]."""
        if _is_short_inference(x):
            y = product_with_columns(x.flatten(0, 1), self.stream_part(cut), cut.grid(self.inner))
            partial = y.unflatten(0, x.shape[:2])
        else:
            partial = self._forward_impl(
                input=x,
                weight=self.kept_weight(cut),
                bias=None,
                gradient_accumulation_fusion=False,
                allreduce_dgrad=False,
                sequence_parallel=False,
                tp_group=None,
            )
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
