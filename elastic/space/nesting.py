"""The nested layout: which part of every parameter a width keeps, for slicing, masks, sharding and permutation alike.

Every dimension of every parameter is `outer` repeats of a few blocks laid side by side, each block a small grid whose
prefix along every grid direction is kept (docs/design.md 2). A tensor-parallel rank owns whole outer repeats of a
single-block dimension, or its share of every block, so the kept weights never depend on the number of ranks.

    ffn rows            lanes x [F/lanes]            keep f/lanes of each lane
    x, z rows           [G, H/G, P]                  keep h/G heads of each group, p channels of each head
    q rows              KV x [q/KV heads, a]         keep q'/KV query heads of each KV group
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from elastic.space.pattern import LayerKind
from elastic.space.shape import ModelShape


@dataclass(frozen=True)
class Block:
    """A run of rows seen as a grid: `full` sizes, of which the leading `kept` sizes stay."""

    full: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Tell whether nothing is cut from this block."""
        return self.full == self.kept


@dataclass(frozen=True)
class DimLayout:
    """`outer` repeats of `blocks`, in row order."""

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
        return all(block.is_whole for block in self.blocks)


class DimKind(StrEnum):
    """Meaning of one dimension of a parameter."""

    VOCAB = "vocab"
    HIDDEN = "hidden"
    FFN = "ffn"
    IN_PROJ = "z x B C dt"
    CONV = "x B C"
    INNER = "mamba heads x channels"
    MAMBA_HEAD = "mamba heads"
    QKV = "per KV group: q.. k v"
    CONTEXT = "attention heads x channels"
    WHOLE = "never cut, never sharded"


# Megatron-Core's own parameter names, after the layer prefix `decoder.layers.i.`.
LAYER_PARAMETERS: dict[str, tuple[DimKind, ...]] = {
    "norm.weight": (DimKind.HIDDEN,),
    "mixer.in_proj.weight": (DimKind.IN_PROJ, DimKind.HIDDEN),
    "mixer.conv1d_weight": (DimKind.CONV, DimKind.WHOLE, DimKind.WHOLE),
    "mixer.conv1d_bias": (DimKind.CONV,),
    "mixer.A_log": (DimKind.MAMBA_HEAD,),
    "mixer.D": (DimKind.MAMBA_HEAD,),
    "mixer.dt_bias": (DimKind.MAMBA_HEAD,),
    "mixer.norm.weight": (DimKind.INNER,),
    "mixer.out_proj.weight": (DimKind.HIDDEN, DimKind.INNER),
    "input_layernorm.weight": (DimKind.HIDDEN,),
    "self_attention.linear_qkv.weight": (DimKind.QKV, DimKind.HIDDEN),
    "self_attention.linear_proj.weight": (DimKind.HIDDEN, DimKind.CONTEXT),
    "pre_mlp_layernorm.weight": (DimKind.HIDDEN,),
    "mlp.linear_fc1.weight": (DimKind.FFN, DimKind.HIDDEN),
    "mlp.linear_fc2.weight": (DimKind.HIDDEN, DimKind.FFN),
}
MODEL_PARAMETERS: dict[str, tuple[DimKind, ...]] = {
    "embedding.word_embeddings.weight": (DimKind.VOCAB, DimKind.HIDDEN),
    "decoder.final_norm.weight": (DimKind.HIDDEN,),
    "output_layer.weight": (DimKind.VOCAB, DimKind.HIDDEN),
}
LAYER_PREFIX = "decoder.layers."


def split_parameter_name(name: str) -> tuple[int | None, str]:
    """Split ``decoder.layers.7.mixer.D`` into (7, ``mixer.D``); a name outside the layers gives (None, name)."""
    if not name.startswith(LAYER_PREFIX):
        return None, name
    index, _, rest = name[len(LAYER_PREFIX) :].partition(".")
    return int(index), rest


def parameter_dims(name: str) -> tuple[DimKind, ...]:
    """Return what each dimension of a Megatron-Core parameter means; raises KeyError for an unknown name."""
    layer_index, rest = split_parameter_name(name)
    return MODEL_PARAMETERS[rest] if layer_index is None else LAYER_PARAMETERS[rest]


@dataclass(frozen=True)
class Cut:
    """Full and kept sizes along every elastic dimension, for one layer and one tensor-parallel size.

    `ffn`, `mamba_heads` and `attention_heads` are (full, kept) of that layer; unused ones may be (0, 0).
    """

    shape: ModelShape
    hidden: int
    head_channels: int
    ffn: tuple[int, int] = (0, 0)
    mamba_heads: tuple[int, int] = (0, 0)
    attention_heads: tuple[int, int] = (0, 0)
    lanes: int = 1
    tensor_parallel: int = 1

    @classmethod
    def of_layer(
        cls,
        shape: ModelShape,
        layer_index: int | None,
        kept: int,
        *,
        hidden: int,
        head_channels: int,
        lanes: int = 1,
        tensor_parallel: int = 1,
    ) -> "Cut":
        """Cut one layer of `shape` to `kept` neurons or heads; `layer_index` None: parameters outside the layers."""
        widths = dict.fromkeys(LayerKind, (0, 0))
        if layer_index is not None:
            widths[shape.pattern.kinds[layer_index]] = (shape.width(layer_index), kept)
        return cls(
            shape=shape,
            hidden=hidden,
            head_channels=head_channels,
            ffn=widths[LayerKind.MLP],
            mamba_heads=widths[LayerKind.MAMBA],
            attention_heads=widths[LayerKind.ATTENTION],
            lanes=lanes,
            tensor_parallel=tensor_parallel,
        )

    def layout(self, kind: DimKind) -> DimLayout:
        """Return the layout of one dimension on one tensor-parallel rank."""
        shape, tp = self.shape, self.tensor_parallel
        groups, kv_heads = shape.mamba_groups // tp, shape.kv_heads // tp
        full_heads, heads = (width // shape.mamba_groups for width in self.mamba_heads)
        full_queries, queries = (width // shape.kv_heads for width in self.attention_heads)
        channels, state, a = shape.head_channels, shape.mamba_state, shape.attention_channels
        inner = Block((groups, full_heads, channels), (groups, heads, self.head_channels))
        group_state = Block((groups * state,), (groups * state,))
        dt = Block((groups, full_heads), (groups, heads))
        query, key_or_value = Block((full_queries, a), (queries, a)), Block((a,), (a,))
        # An FFN that is not cut needs no lanes: one run per rank.
        lanes = tp if self.ffn[0] == self.ffn[1] else self.lanes
        lane = Block((self.ffn[0] // lanes,), (self.ffn[1] // lanes,))
        match kind:
            case DimKind.HIDDEN:
                return DimLayout((Block((shape.hidden,), (self.hidden,)),))
            case DimKind.VOCAB:
                return DimLayout((Block((shape.vocab // tp,), (shape.vocab // tp,)),))
            case DimKind.FFN:
                return DimLayout((lane,), outer=lanes // tp)
            case DimKind.IN_PROJ:
                return DimLayout((inner, inner, group_state, group_state, dt))
            case DimKind.CONV:
                return DimLayout((inner, group_state, group_state))
            case DimKind.INNER:
                return DimLayout((inner,))
            case DimKind.MAMBA_HEAD:
                return DimLayout((dt,))
            case DimKind.QKV:
                return DimLayout((query, key_or_value, key_or_value), outer=kv_heads)
            case DimKind.CONTEXT:
                return DimLayout((query,), outer=kv_heads)
            case DimKind.WHOLE:
                raise ValueError("a WHOLE dimension has no layout; it is passed through")


def parameter_layouts(name: str, shape: ModelShape) -> tuple[DimLayout | None, ...]:
    """Return the layout of every dimension of a full parameter; None for a dimension that is never cut."""
    layer_index, _ = split_parameter_name(name)
    width = 0 if layer_index is None else shape.width(layer_index)
    cut = Cut.of_layer(shape, layer_index, width, hidden=shape.hidden, head_channels=shape.head_channels)
    return tuple(None if kind is DimKind.WHOLE else cut.layout(kind) for kind in parameter_dims(name))


def parameter_size(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Return the full size of one parameter; raises KeyError for a name the model does not have."""
    whole = iter((1, shape.conv_kernel))  # the depthwise convolution's weight is [channels, 1, taps]
    return tuple(next(whole) if layout is None else layout.full_size for layout in parameter_layouts(name, shape))


def take(tensor: Tensor, dim: int, layout: DimLayout) -> Tensor:
    """Keep the nested part of one dimension; differentiable, a view where the layout allows it.

    Raises ValueError if the dimension does not have `layout.full_size` rows.
    """
    if tensor.shape[dim] != layout.full_size:
        raise ValueError(f"dimension {dim} has {tensor.shape[dim]} rows, the layout expects {layout.full_size}")
    if layout.is_whole:
        return tensor
    if layout.outer == 1 and len(layout.blocks) == 1 and len(layout.blocks[0].full) == 1:
        return tensor.narrow(dim, 0, layout.blocks[0].kept[0])
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    rows = tensor.reshape(*before, layout.outer, -1, *after)
    sizes = [math.prod(block.full) for block in layout.blocks]
    grids = []
    for block, part in zip(layout.blocks, rows.split(sizes, dim=dim + 1), strict=True):
        grid = part.reshape(*before, layout.outer, *block.full, *after)
        for direction, kept in enumerate(block.kept):
            grid = grid.narrow(dim + 1 + direction, 0, kept)
        grids.append(grid)
    if len(grids) == 1:
        return grids[0].reshape(*before, -1, *after)
    if torch.is_grad_enabled():
        parts = [grid.reshape(*before, layout.outer, -1, *after) for grid in grids]
        return torch.cat(parts, dim=dim + 1).reshape(*before, -1, *after)
    # The same without the parts: where nothing is differentiated, memory holds one copy of what is kept.
    kept_rows = [math.prod(block.kept) for block in layout.blocks]
    joined = tensor.new_empty(*before, layout.outer, sum(kept_rows), *after)
    for block, grid, room in zip(layout.blocks, grids, joined.split(kept_rows, dim=dim + 1), strict=True):
        room.unflatten(dim + 1, block.kept).copy_(grid)
    return joined.reshape(*before, -1, *after)


def kept_indices(layout: DimLayout) -> Tensor:
    """Return the kept row numbers of one dimension, ascending within each block, int64."""
    return take(torch.arange(layout.full_size), 0, layout)


def mask_table(choices: Sequence[int], repeats: int, length: int) -> Tensor:
    """Build 0/1 masks [K, repeats * length]: choice k keeps the first choices[k] / repeats of every repeat, fp32.

    `repeats` is the number of lanes, groups or KV groups on this rank times nothing else; `choices` are given
    for those repeats together.
    """
    table = torch.zeros(len(choices), repeats, length)
    for row, choice in enumerate(choices):
        table[row, :, : choice // repeats] = 1.0
    return table.reshape(len(choices), repeats * length)
