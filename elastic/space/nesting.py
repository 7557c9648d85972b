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

import torch
from torch import Tensor

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
    """Keep the nested part of one dimension; differentiable, a view where the grid allows it.

    Raises ValueError if the dimension does not have `grid.full_size` rows.
    """
    if tensor.shape[dim] != grid.full_size:
        raise ValueError(f"dimension {dim} has {tensor.shape[dim]} rows, the nested layout expects {grid.full_size}")
    if grid.is_whole:
        return tensor
    if grid.outer == 1 and len(grid.blocks) == 1 and len(grid.blocks[0].full) == 1:
        return tensor.narrow(dim, 0, grid.blocks[0].kept[0])
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    rows = tensor.reshape(*before, grid.outer, -1, *after)
    sizes = [math.prod(block.full) for block in grid.blocks]
    cuts = []
    for block, part in zip(grid.blocks, rows.split(sizes, dim=dim + 1), strict=True):
        cut = part.reshape(*before, grid.outer, *block.full, *after)
        for direction, kept in enumerate(block.kept):
            cut = cut.narrow(dim + 1 + direction, 0, kept)
        cuts.append(cut)
    if len(cuts) == 1:
        return cuts[0].reshape(*before, -1, *after)
    if torch.is_grad_enabled():
        parts = [cut.reshape(*before, grid.outer, -1, *after) for cut in cuts]
        return torch.cat(parts, dim=dim + 1).reshape(*before, -1, *after)
    # The same without the parts: where nothing is differentiated, memory holds one copy of what is kept.
    kept_rows = [math.prod(block.kept) for block in grid.blocks]
    joined = tensor.new_empty(*before, grid.outer, sum(kept_rows), *after)
    for block, cut, room in zip(grid.blocks, cuts, joined.split(kept_rows, dim=dim + 1), strict=True):
        room.unflatten(dim + 1, block.kept).copy_(cut)
    return joined.reshape(*before, -1, *after)


def kept_indices(grid: Grid) -> Tensor:
    """Return the kept row numbers of one dimension, ascending within each block, int64."""
    return take(torch.arange(grid.full_size), 0, grid)


def mask_table(choices: Sequence[int], parts: int, width: int) -> Tensor:
    """Build 0/1 masks [K, width], fp32: row k keeps the first choices[k] / parts of each of the `parts`."""
    table = torch.zeros(len(choices), parts, width // parts)
    for row, choice in enumerate(choices):
        table[row, :, : choice // parts] = 1.0
    return table.reshape(len(choices), width)
