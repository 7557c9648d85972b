"""Split full parameters over tensor-parallel ranks and join them again, from the one table of the nested layout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.space.nesting import Cut, DimKind, DimLayout, parameter_dims, split_parameter_name
from elastic.space.shape import ModelShape

_REPLICATED = (DimKind.HIDDEN, DimKind.WHOLE)


def parameter_layouts(name: str, shape: ModelShape) -> tuple[DimLayout | None, ...]:
    """Return the layout of every dimension of a full parameter; None for a dimension that is never cut."""
    layer_index, _ = split_parameter_name(name)
    width = 0 if layer_index is None else shape.width(layer_index)
    cut = Cut.of_layer(shape, layer_index, width, hidden=shape.hidden, head_channels=shape.head_channels)
    return tuple(None if kind is DimKind.WHOLE else cut.layout(kind) for kind in parameter_dims(name))


def full_parameter_size(name: str, shape: ModelShape, conv_kernel: int | None = None) -> tuple[int, ...]:
    """Return the size of a full parameter."""
    whole = iter((1, conv_kernel or shape.conv_kernel))  # the convolution weight is [channels, 1, taps]
    return tuple(next(whole) if layout is None else layout.full_size for layout in parameter_layouts(name, shape))


def sharded_dim(name: str) -> int | None:
    """Return the dimension that tensor parallelism shards, or None for a replicated parameter."""
    return next((dim for dim, kind in enumerate(parameter_dims(name)) if kind not in _REPLICATED), None)


def _block_sizes(name: str, shape: ModelShape, dim: int) -> list[int]:
    """Return the runs of rows that are split one by one ([z, x, B, C, dt]); a repeated layout is one run."""
    layout = parameter_layouts(name, shape)[dim]
    assert layout is not None
    if layout.outer > 1 or len(layout.blocks) == 1:
        return [layout.full_size]
    return [DimLayout((block,)).full_size for block in layout.blocks]


def shard_tensor(full: Tensor, name: str, shape: ModelShape, rank: int, size: int) -> Tensor:
    """Return tensor-parallel rank `rank`'s part of a full parameter."""
    dim = sharded_dim(name)
    if dim is None or size == 1:
        return full
    parts = full.split(_block_sizes(name, shape, dim), dim=dim)
    return torch.cat([part.chunk(size, dim=dim)[rank] for part in parts], dim=dim)


def unshard_tensors(shards: Sequence[Tensor], name: str, shape: ModelShape) -> Tensor:
    """Join the parts of all tensor-parallel ranks, in rank order, into the full parameter."""
    dim = sharded_dim(name)
    if dim is None or len(shards) == 1:
        return shards[0]
    sizes = [rows // len(shards) for rows in _block_sizes(name, shape, dim)]
    split = [shard.split(sizes, dim=dim) for shard in shards]
    return torch.cat([parts[block] for block in range(len(sizes)) for parts in split], dim=dim)
