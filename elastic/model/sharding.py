"""Split full parameters over tensor-parallel ranks and join them again, from the one table of the nested layout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.space.layers import DIMS, parameter_dims
from elastic.space.nesting import Grid, parameter_grids
from elastic.space.shape import ModelShape


def sharded_dim(name: str) -> int | None:
    """Return the dimension that tensor parallelism shards, or None for a replicated parameter."""
    return next((dim for dim, kind in enumerate(parameter_dims(name)) if DIMS[kind].sharded), None)


def block_sizes(name: str, shape: ModelShape, dim: int) -> list[int]:
    """Return the runs of rows that are split one by one ([z, x, B, C, dt]); a repeated layout is one run."""
    layout = parameter_grids(name, shape)[dim]
    assert layout is not None
    if layout.outer > 1 or len(layout.blocks) == 1:
        return [layout.full_size]
    return [Grid((block,)).full_size for block in layout.blocks]


def shard_tensor(full: Tensor, name: str, shape: ModelShape, rank: int, size: int) -> Tensor:
    """Return tensor-parallel rank `rank`'s part of a full parameter."""
    dim = sharded_dim(name)
    if dim is None or size == 1:
        return full
    parts = full.split(block_sizes(name, shape, dim), dim=dim)
    return torch.cat([part.chunk(size, dim=dim)[rank] for part in parts], dim=dim)


def unshard_tensors(shards: Sequence[Tensor], name: str, shape: ModelShape) -> Tensor:
    """Join the parts of all tensor-parallel ranks, in rank order, into the full parameter."""
    dim = sharded_dim(name)
    if dim is None or len(shards) == 1:
        return shards[0]
    sizes = [rows // len(shards) for rows in block_sizes(name, shape, dim)]
    split = [shard.split(sizes, dim=dim) for shard in shards]
    return torch.cat([parts[block] for block in range(len(sizes)) for parts in split], dim=dim)
