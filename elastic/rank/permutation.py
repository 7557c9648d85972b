"""Rank the parent's parts and reorder them so that every submodel is a prefix; the function does not change.

Legend: D hidden, F ffn, P head channels, G Mamba groups, H Mamba heads, KV key-value heads, q query heads,
a attention channels, N state.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic.space.axes import AXES, LANES, Axis
from elastic.space.layers import DimKind, Direction, parameter_dims, split_parameter_name
from elastic.space.nesting import Cut
from elastic.space.shape import ModelShape
from elastic.world.files import written_aside

Order = tuple[int, ...]


class RankingError(ValueError):
    """Calibration data, a request or a ranking that cannot order the parent's parts, or a ranking there already."""


@dataclass(frozen=True)
class Ranking:
    """Best-first orders of everything a width can cut. Entries are the parent's own numbers.

    One entry per layer of the kind, in layer order: `ffn` [F]; `mamba_heads` [G][H/G], numbers inside the group;
    `mamba_channels` [P], the same for every head of the layer; `attention_heads` [KV][q/KV], numbers inside the KV
    group. `hidden` [D] serves the whole residual stream. `depth` orders all layer indices.
    """

    hidden: Order
    ffn: tuple[Order, ...]
    mamba_heads: tuple[tuple[Order, ...], ...]
    mamba_channels: tuple[Order, ...]
    attention_heads: tuple[tuple[Order, ...], ...]
    depth: Order

    @classmethod
    def identity(cls, parent: ModelShape) -> "Ranking":
        """Return the ranking that leaves the parent as it is (FFN neurons are still dealt into lanes)."""
        groups, kv_heads = parent.mamba_groups, parent.kv_heads
        return cls(
            hidden=tuple(range(parent.hidden)),
            ffn=tuple(tuple(range(width)) for width in parent.ffn),
            mamba_heads=tuple((tuple(range(width // groups)),) * groups for width in parent.mamba_heads),
            mamba_channels=(tuple(range(parent.head_channels)),) * len(parent.mamba_heads),
            attention_heads=tuple((tuple(range(width // kv_heads)),) * kv_heads for width in parent.attention_heads),
            depth=tuple(range(len(parent.pattern))),
        )

    def check(self, parent: ModelShape) -> None:
        """Raise RankingError, listing every problem, unless each order is a permutation of the parent's size."""
        expected, given, problems = Ranking.identity(parent).named_orders(), self.named_orders(), []
        for name in sorted(expected.keys() | given.keys()):
            if name not in given or name not in expected:
                problems.append(f"{name} is {'missing' if name in expected else 'not part of the parent'}")
            elif sorted(given[name]) != list(expected[name]):
                problems.append(
                    f"{name} must order 0..{len(expected[name]) - 1} once, it has {len(given[name])} entries"
                )
        if problems:
            raise RankingError("ranking: " + "; ".join(problems))

    def named_orders(self) -> dict[str, Order]:
        """Return every order by the name it has in a ranking file and in messages: `hidden`, `mamba_heads.0.1`."""
        return {name: order for field, orders in vars(self).items() for name, order in _named(field, orders)}


def _named(name: str, orders: tuple[Any, ...]) -> Iterator[tuple[str, Order]]:
    if orders and isinstance(orders[0], int):
        yield name, orders
    else:
        for index, inner in enumerate(orders):
            yield from _named(f"{name}.{index}", inner)


def _order(direction: Direction, layer_index: int | None, parent: ModelShape, ranking: Ranking, lanes: int) -> Tensor:
    """Return the old neuron, head or channel for every new one along one direction of a layer's grid, int64."""
    if not isinstance(direction, Axis):
        return torch.arange(getattr(parent, direction))
    entry, size = AXES[direction], parent.layer_widths(layer_index)[direction]
    if entry.ranking is None:
        return torch.arange(size)
    ranked = getattr(ranking, entry.ranking)
    if layer_index is not None and entry.kind is not None:
        ranked = ranked[parent.pattern.ordinal(layer_index)]
    order = torch.tensor(ranked)
    if entry.parts == LANES:  # rank r goes to lane r mod lanes, position r // lanes
        if size % lanes:
            raise RankingError(f"ranking: {entry.size} = {size} must be a multiple of lanes = {lanes}")
        order = order.view(-1, lanes).T
    elif entry.parts is not None:  # numbers inside each part
        order = order + order.shape[1] * torch.arange(len(order)).unsqueeze(1)
    return order.reshape(-1)


def row_order(kind: DimKind, layer_index: int | None, parent: ModelShape, ranking: Ranking, lanes: int) -> Tensor:
    """Return the old row for every new row of one dimension, int64."""
    grid, found = Cut.of_layer(parent, layer_index, {}).grid(kind), []
    runs = [math.prod(block.full) for block in grid.blocks]
    blocks = torch.arange(grid.full_size).view(grid.outer, -1).split(runs, dim=1)
    for rows, directions in zip(blocks, kind.blocks.values(), strict=True):
        orders = [_order(direction, layer_index, parent, ranking, lanes) for direction in directions]
        cells = rows.reshape([len(order) for order in orders])
        for dim, order in enumerate(orders):
            cells = cells.index_select(dim, order)
        found.append(cells.reshape(grid.outer, -1))
    return torch.cat(found, dim=1).reshape(-1)


def permute_parameter(tensor: Tensor, name: str, parent: ModelShape, ranking: Ranking, lanes: int) -> Tensor:
    """Reorder one full parameter of the parent along all its dimensions; a new tensor of the same size.

    The permuted parent is the same function, with the best parts first (docs/design.md 2). Raises RankingError if an
    FFN width cannot be dealt into `lanes`.
    """
    layer_index, _ = split_parameter_name(name)
    for dim, kind in enumerate(parameter_dims(name)):
        order = row_order(kind, layer_index, parent, ranking, lanes)
        if tensor.shape[dim] != order.numel():
            raise ValueError(f"{name}: dimension {dim} has {tensor.shape[dim]} rows, expected {order.numel()}")
        if any(isinstance(direction, Axis) for block in kind.blocks.values() for direction in block):
            tensor = tensor.index_select(dim, order.to(tensor.device))
    return tensor


def save_ranking(path: Path, ranking: Ranking, scores: Mapping[str, Tensor], provenance: Mapping[str, str]) -> None:
    """Write one safetensors file of `ranking.NAME` (int64) and `score.NAME`; provenance goes into its string metadata.

    Written aside, then renamed. Raises RankingError if the file exists.
    """
    if path.exists():
        raise RankingError(f"ranking file {path} exists; choose another path")
    tensors = {f"ranking.{name}": torch.tensor(order) for name, order in ranking.named_orders().items()}
    tensors |= {f"score.{name}": score.detach().cpu().clone() for name, score in scores.items()}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata=dict(provenance))
