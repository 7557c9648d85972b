"""Tensor-parallel linears that compute only the nested part of their weight."""

from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from elastic.space.nesting import Cut, DimKind, take


class ElasticColumnParallelLinear(ColumnParallelLinear):
    """Y = X W^T, rows of W sharded. `rows` and `columns` say what the two dimensions of W mean."""

    def __init__(self, *args: Any, rows: DimKind, columns: DimKind, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows, self.columns = rows, columns

    def kept_weight(self, cut: Cut) -> Tensor:
        """Return the part of this rank's weight that a cut computes with: [kept rows, kept columns]."""
        return take(take(self.weight, 1, cut.layout(self.columns)), 0, cut.layout(self.rows))

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S(/tp), B, kept columns] to [S, B, kept rows of this rank]."""
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
        return take(take(self.weight, 0, cut.layout(self.rows)), 1, cut.layout(self.columns))

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S, B, kept columns of this rank] to [S(/tp), B, kept rows]."""
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
