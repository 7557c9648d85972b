"""Rank the parent's parts and reorder them so that every submodel is a prefix; the function does not change.

Legend: D hidden, F ffn, P head channels, G Mamba groups, H Mamba heads, KV key-value heads, q query heads,
a attention channels, N state.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic.rank.slicing import TensorSource, reader
from elastic.space.axes import AXES, LANES, Axis
from elastic.space.layers import DIMS, DimKind, Direction, parameter_dims, parameter_names, split_parameter_name
from elastic.space.nesting import Cut
from elastic.space.shape import ModelShape
from elastic.world.files import written_aside

Order = tuple[int, ...]


class RankingError(ValueError):
    """A ranking that is not a permutation of the parent's parts, or is there already."""


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
        expected, problems = _named_orders(Ranking.identity(parent)), []
        given = _named_orders(self)
        for name in sorted(expected.keys() | given.keys()):
            if name not in given or name not in expected:
                problems.append(f"{name} is {'missing' if name in expected else 'not part of the parent'}")
            elif sorted(given[name]) != list(expected[name]):
                problems.append(
                    f"{name} must order 0..{len(expected[name]) - 1} once, it has {len(given[name])} entries"
                )
        if problems:
            raise RankingError("ranking: " + "; ".join(problems))


def _named_orders(ranking: Ranking) -> dict[str, Order]:
    """Give every order a name; the file format and the checks use the same names."""
    orders = {"hidden": ranking.hidden, "depth": ranking.depth}
    for field, layers in (("ffn", ranking.ffn), ("mamba_channels", ranking.mamba_channels)):
        orders |= {f"{field}.{ordinal}": order for ordinal, order in enumerate(layers)}
    for field, nested in (("mamba_heads", ranking.mamba_heads), ("attention_heads", ranking.attention_heads)):
        for ordinal, groups in enumerate(nested):
            orders |= {f"{field}.{ordinal}.{group}": order for group, order in enumerate(groups)}
    return orders


def deal_into_lanes(ranking: Order, lanes: int) -> Tensor:
    """Return the old neuron for every new row [F]: rank r goes to lane r mod lanes, position r // lanes.

    Raises RankingError if the number of neurons is not a multiple of `lanes`.
    """
    if len(ranking) % lanes:
        raise RankingError(f"ranking: ffn = {len(ranking)} must be a multiple of lanes = {lanes}")
    return torch.tensor(ranking).view(-1, lanes).T.reshape(-1)


def _order(direction: Direction, size: int, ordinal: int, ranking: Ranking, lanes: int) -> Tensor:
    """Return the old neuron, head or channel for every new one along one direction of a layer's grid, [size] int64."""
    entry = AXES[direction] if isinstance(direction, Axis) else None
    if entry is None or entry.ranking is None:
        return torch.arange(size)
    ranked = getattr(ranking, entry.ranking)
    own = ranked if entry.kind is None else ranked[ordinal]
    if entry.parts == LANES:
        return deal_into_lanes(own, lanes)
    order = torch.tensor(own)
    if entry.parts is not None:  # numbers inside each part
        order = order + order.shape[1] * torch.arange(len(order)).unsqueeze(1)
    return order.reshape(-1)


def row_order(kind: DimKind, layer_index: int | None, parent: ModelShape, ranking: Ranking, lanes: int) -> Tensor:
    """Return the old row for every new row of one dimension, int64."""
    ordinal = 0 if layer_index is None else parent.pattern.ordinal(layer_index)
    widths = parent.layer_widths(layer_index)
    grid = Cut.of_layer(parent, layer_index, {}).grid(kind)
    runs = [math.prod(block.full) for block in grid.blocks]
    blocks = torch.arange(grid.full_size).view(grid.outer, -1).split(runs, dim=1)
    found = []
    for rows, directions in zip(blocks, DIMS[kind].blocks.values(), strict=True):
        sizes = [widths[d] if isinstance(d, Axis) else getattr(parent, d) for d in directions]
        orders = [_order(d, size, ordinal, ranking, lanes) for d, size in zip(directions, sizes, strict=True)]
        cells = rows.reshape(sizes)
        for direction, order in enumerate(orders):
            cells = cells.index_select(direction, order)
        found.append(cells.reshape(grid.outer, -1))
    return torch.cat(found, dim=1).reshape(-1)


def permute_parameter(tensor: Tensor, name: str, parent: ModelShape, ranking: Ranking, lanes: int) -> Tensor:
    """Reorder one full parameter of the parent along all its dimensions; a new tensor of the same size."""
    layer_index, _ = split_parameter_name(name)
    for dim, kind in enumerate(parameter_dims(name)):
        order = row_order(kind, layer_index, parent, ranking, lanes)
        if tensor.shape[dim] != order.numel():
            raise ValueError(f"{name}: dimension {dim} has {tensor.shape[dim]} rows, expected {order.numel()}")
        if any(isinstance(direction, Axis) for block in DIMS[kind].blocks.values() for direction in block):
            tensor = tensor.index_select(dim, order.to(tensor.device))
    return tensor


def permute_tensors(
    source: TensorSource, parent: ModelShape, ranking: Ranking, lanes: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the permuted parent: the same function, with the best parts first (docs/design.md 2).

    Raises RankingError if the ranking does not fit the parent or an FFN width cannot be dealt into `lanes`.
    """
    ranking.check(parent)
    for order in ranking.ffn:
        deal_into_lanes(order, lanes)
    read = reader(source)
    return ((name, permute_parameter(read(name), name, parent, ranking, lanes)) for name in parameter_names(parent))


def save_ranking(path: Path, ranking: Ranking, scores: Mapping[str, Tensor], provenance: Mapping[str, str]) -> None:
    """Write one safetensors file of `ranking.NAME` (int64) and `score.NAME`; provenance goes into its string metadata.

    Written aside, then renamed. Raises RankingError if the file exists.
    """
    if path.exists():
        raise RankingError(f"ranking file {path} exists; choose another path")
    orders = _named_orders(ranking)
    tensors = {f"ranking.{name}": torch.tensor(order, dtype=torch.int64) for name, order in orders.items()}
    tensors |= {f"score.{name}": score.detach().cpu().clone() for name, score in scores.items()}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata=dict(provenance))
