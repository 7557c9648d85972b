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


class ElasticColumnParallelLinear(ColumnParallelLinear):
    """Y = X W^T, rows of W sharded. `rows` and `columns` say what the two dimensions of W mean."""

    def __init__(self, *args: Any, rows: DimKind, columns: DimKind, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows, self.columns = rows, columns

    def kept_weight(self, cut: Cut) -> Tensor:
        """Return the part of this rank's weight that a cut computes with: [kept rows, kept columns]."""
        return take(take(self.weight, 1, cut.grid(self.columns)), 0, cut.grid(self.rows))

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S(/tp), B, kept columns] to [S, B, kept rows of this rank]."""
        if _is_short_inference(x) and not self.sequence_parallel:
            weight = take(self.weight, 1, cut.grid(self.columns))  # a view: columns are hidden channels
            return product_with_rows(x.flatten(0, 1), weight, cut.grid(self.rows)).unflatten(0, x.shape[:2])
        return self._forward_impl(
            input=x,
            weight=self.kept_weight(cut),
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )


class ElasticRowParallelLinear(RowParallelLinear):
    """Y = X W^T, columns of W sharded; the sum over ranks is part of it."""

    def __init__(self, *args: Any, rows: DimKind, columns: DimKind, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows, self.columns = rows, columns

    def kept_weight(self, cut: Cut) -> Tensor:
        """Return the part of this rank's weight that a cut computes with: [kept rows, kept columns]."""
        return take(take(self.weight, 0, cut.grid(self.rows)), 1, cut.grid(self.columns))

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S, B, kept columns of this rank] to [S(/tp), B, kept rows]."""
        if _is_short_inference(x):
            weight = take(self.weight, 0, cut.grid(self.rows))  # a view: rows are hidden channels
            flat = product_with_columns(x.flatten(0, 1), weight, cut.grid(self.columns))
            partial = flat.unflatten(0, x.shape[:2])
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
