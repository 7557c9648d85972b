"""The nested layout: which part of every parameter a width keeps, for slicing, masks and sharding alike.

A tensor-parallel rank owns its share of every block's first direction, which is whole groups, whole KV groups and whole
lanes, so the kept weights never depend on the number of ranks (docs/design.md 2; the dimensions are in layers.py).

    ffn rows            [lanes, F/lanes]             keep f/lanes of each lane
    x, z rows           [G, H/G, P]                  keep h/G heads of each group, p channels of each head
    q rows              KV x [q/KV heads, a]         keep q'/KV query heads of each KV group
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic.space.axes import AXES, LANES, Axis
from elastic.space.layers import DimKind, Direction, parameter_dims, split_parameter_name
from elastic.space.shape import ModelShape


@dataclass(frozen=True)
class Block:
    """A run of rows seen as a grid: `full` sizes, of which the leading `kept` sizes stay."""

    full: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """The rows of one dimension: `outer` repeats of `blocks`, in row order."""

    blocks: tuple[Block, ...]
    outer: int = 1

    @property
    def full_size(self) -> int:
        """Rows before the cut."""
        return self.outer * sum(math.prod(block.full) for block in self.blocks)

    @property
    def kept_size(self) -> int:
        """Rows after the cut."""
        return self.outer * sum(math.prod(block.kept) for block in self.blocks)

    @property
    def is_whole(self) -> bool:
        """Tell whether nothing is cut."""
        return all(block.full == block.kept for block in self.blocks)

    @property
    def is_prefix(self) -> bool:
        """Tell whether the kept rows are the first ones: a view."""
        if self.outer > 1 or len(self.blocks) > 1:
            return self.is_whole
        (block,) = self.blocks
        cut = [full != kept for full, kept in zip(block.full, block.kept, strict=True)]
        return not any(cut) or (sum(cut) == 1 and math.prod(block.full[: cut.index(True)]) == 1)

    @property
    def kept_grid(self) -> "Grid":
        """Return the grid of what stays: whole."""
        return Grid(tuple(Block(block.kept, block.kept) for block in self.blocks), self.outer)


@dataclass(frozen=True)
class Cut:
    """Full and kept width along every axis of one layer, for one tensor-parallel size: (axis, full, kept)."""

    shape: ModelShape
    widths: tuple[tuple[Axis, int, int], ...]
    lanes: int = 1
    tensor_parallel: int = 1

    @classmethod
    def of_layer(
        cls,
        shape: ModelShape,
        layer_index: int | None,
        kept: Mapping[Axis, int],
        *,
        lanes: int = 1,
        tensor_parallel: int = 1,
    ) -> "Cut":
        """Cut one layer of `shape` to the widths `kept`, an absent axis stays; None: what stands outside the layers."""
        full = shape.layer_widths(layer_index)
        widths = tuple((axis, width, kept.get(axis, width)) for axis, width in full.items())
        return cls(shape, widths, lanes, tensor_parallel)

    def kept(self, axis: Axis) -> int:
        """Return the width that stays along one axis of this layer."""
        return next(kept for known, _, kept in self.widths if known is axis)

    def grid(self, kind: DimKind) -> Grid:
        """Return the rows of one dimension on one tensor-parallel rank."""
        ranks = self.tensor_parallel if kind.is_sharded else 1
        blocks = tuple(self._block(directions, ranks) for directions in kind.blocks.values())
        if not kind.is_interleaved:
            return Grid(blocks)
        outer = blocks[0].full[0]
        return Grid(tuple(Block(block.full[1:], block.kept[1:]) for block in blocks), outer)

    def _block(self, directions: Sequence[Direction], ranks: int) -> Block:
        full, kept = list[int](), list[int]()
        for direction in directions:
            if not isinstance(direction, Axis):
                width = limit = getattr(self.shape, direction)
            else:
                limit, width = next((f, k) for axis, f, k in (*self.widths, (direction, 0, 0)) if axis is direction)
                if (name := AXES[direction].parts) is not None:
                    # What is not cut needs no lanes: one run per rank.
                    lanes = self.tensor_parallel if limit == width else self.lanes
                    parts = lanes if name == LANES else getattr(self.shape, name)
                    full, kept = [*full, parts], [*kept, parts]
                    limit, width = limit // parts, width // parts
            full, kept = [*full, limit], [*kept, width]
        if full:
            full[0], kept[0] = full[0] // ranks, kept[0] // ranks
        return Block(tuple(full), tuple(kept))


def parameter_grids(name: str, shape: ModelShape) -> tuple[Grid, ...]:
    """Return the rows of every dimension of a full parameter; raises KeyError for a name the model does not have."""
    layer_index, _ = split_parameter_name(name)
    cut = Cut.of_layer(shape, layer_index, {})
    return tuple(cut.grid(kind) for kind in parameter_dims(name))


def parameter_size(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Return the full size of one parameter; raises KeyError for a name the model does not have."""
    return tuple(grid.full_size for grid in parameter_grids(name, shape))


def take(tensor: Tensor, dim: int, grid: Grid) -> Tensor:
    """Keep the nested part of one dimension; differentiable, a view where the kept rows are the first, else one copy.

    Raises ValueError if the dimension does not have `grid.full_size` rows.
    """
    return take_each((tensor,), dim, grid)[0]


def take_each(tensors: Sequence[Tensor], dim: int, grid: Grid) -> tuple[Tensor, ...]:
    """Take from tensors of one dtype; in backward they share one fill with zeros. Raises ValueError as `take` does."""
    for rows in (tensor.shape[dim] for tensor in tensors):
        if rows != grid.full_size:
            raise ValueError(f"dimension {dim} has {rows} rows, the nested layout expects {grid.full_size}")
    if grid.is_prefix:
        return tuple(tensors if grid.is_whole else (tensor.narrow(dim, 0, grid.kept_size) for tensor in tensors))
    assert len({tensor.dtype for tensor in tensors}) == 1, "gradients of one dtype share one fill"
    return _Take.apply(dim, grid, *tensors)


class _Take(torch.autograd.Function):
    """Copies the kept rows; their gradient is written into zeros, every row once: the same bits on every device."""

    @staticmethod
    def forward(ctx: Any, dim: int, grid: Grid, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dim, ctx.grid, ctx.sizes = dim, grid, [tensor.shape for tensor in tensors]
        return tuple(_copy_kept(tensor, dim, grid) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = grads[0].new_zeros(sum(size.numel() for size in ctx.sizes))
        parts = zeros.split([size.numel() for size in ctx.sizes])
        full = [part.view(size) for part, size in zip(parts, ctx.sizes, strict=True)]
        for total, grad in zip(full, grads, strict=True):
            put_kept(total, ctx.dim, ctx.grid, grad)
        return None, None, *full


def _copy_kept(tensor: Tensor, dim: int, grid: Grid) -> Tensor:
    if len(grid.blocks) > 1:
        return tensor.index_select(dim, _rows(grid, tensor))
    kept = tensor.new_empty(*tensor.shape[:dim], grid.kept_size, *tensor.shape[dim + 1 :])
    kept_blocks(kept, dim, grid.kept_grid)[0].copy_(kept_blocks(tensor, dim, grid)[0])
    return kept


def put_kept(total: Tensor, dim: int, grid: Grid, part: Tensor) -> None:
    """Write `part` [..., kept rows, ...] into its places in `total` [..., full rows, ...]."""
    if len(grid.blocks) > 1:
        total.index_copy_(dim, _rows(grid, total), part)
    else:
        kept_blocks(total, dim, grid)[0].copy_(kept_blocks(part, dim, grid.kept_grid)[0])


def add_kept(total: Tensor, dim: int, grid: Grid, part: Tensor) -> None:
    """Add `part` [..., kept rows, ...] to its places in `total` [..., full rows, ...], in the precision of `total`."""
    places, parts = kept_blocks(total, dim, grid), kept_blocks(part, dim, grid.kept_grid)
    for place, own in zip(places, parts, strict=True):
        place.add_(own)


def kept_blocks(tensor: Tensor, dim: int, grid: Grid) -> list[Tensor]:
    """Return the kept rows of each block as a view, `dim` seen as [outer, *block.kept]."""
    sizes = [math.prod(block.full) for block in grid.blocks]
    views = []
    for block, part in zip(grid.blocks, tensor.unflatten(dim, (grid.outer, -1)).split(sizes, dim + 1), strict=True):
        view = part.unflatten(dim + 1, block.full or (1,))
        for direction, kept in enumerate(block.kept, start=dim + 1):
            view = view.narrow(direction, 0, kept)
        views.append(view)
    return views


def kept_indices(grid: Grid) -> Tensor:
    """Return the kept row numbers of one dimension, ascending within each block, int64."""
    numbers = kept_blocks(torch.arange(grid.full_size), 0, grid)
    return torch.cat([block.reshape(grid.outer, -1) for block in numbers], dim=1).flatten()


def _rows(grid: Grid, like: Tensor) -> Tensor:
    """Return the kept row numbers where `like` lies. A tensor without storage ends with its mode: made anew."""
    of_device = _rows_of_device if type(like) in (Tensor, nn.Parameter) else _rows_of_device.__wrapped__
    return of_device(grid, like.device)


@cache
def _rows_of_device(grid: Grid, device: torch.device) -> Tensor:
    return kept_indices(grid).to(device)


def mask_table(choices: Sequence[int], parts: int, width: int) -> Tensor:
    """Build 0/1 masks [K, width], fp32: row k keeps the first choices[k] / parts of each of the `parts`."""
    table = torch.zeros(len(choices), parts, width // parts)
    for row, choice in enumerate(choices):
        table[row, :, : choice // parts] = 1.0
    return table.reshape(len(choices), width)
