"""The table of layer kinds: their parameters, what each dimension of one is made of, and what a layer uses.

Names are Megatron-Core's own. Every dimension of every parameter is a few blocks laid side by side, each block a small
grid of which the prefix along every direction is kept (docs/design.md 2). Masks, slices, shards, permutation, parameter
counts and caches are read from here. Adding an axis or a kind: docs/extending.md.

Legend: D hidden, F ffn, G Mamba groups, H Mamba heads, P head channels, N state, Q query heads, KV key-value heads,
a attention channels.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from elastic.space.axes import Axis, LayerKind
from elastic.space.shape import ModelShape

Number = int | float | Tensor
# A direction of a grid: an axis, or a field of ModelShape that nobody narrows.
Direction = Axis | str
Directions = tuple[Direction, ...]

_N: Direction = "mamba_state"
_INNER: Directions = (Axis.MAMBA_HEAD, Axis.MAMBA_CHANNEL)
_STATE: Directions = ("mamba_groups", _N)
_QUERY: Directions = (Axis.ATTENTION_HEAD, "attention_channels")
_KEY: Directions = ("kv_heads", "attention_channels")


class DimKind(Enum):
    """Meaning of one dimension of a parameter: named blocks in row order, each a grid of directions.

    An axis that is dealt over parts (AXES) stands for two directions, the parts and the width of one. Tensor-parallel
    ranks "split" every block or hold it "whole"; "interleaved" blocks are split, too, and laid side by side inside each
    part of the first direction, which all have in common.
    """

    VOCAB = {"vocab": ("vocab",)}, "split"
    HIDDEN = {"hidden": (Axis.HIDDEN,)}, "whole"
    FFN = {"ffn": (Axis.FFN,)}, "split"
    IN_PROJ = {"z": _INNER, "x": _INNER, "B": _STATE, "C": _STATE, "dt": (Axis.MAMBA_HEAD,)}, "split"
    CONV = {"x": _INNER, "B": _STATE, "C": _STATE}, "split"
    INNER = {"x": _INNER}, "split"
    MAMBA_HEAD = {"heads": (Axis.MAMBA_HEAD,)}, "split"
    QKV = {"q": _QUERY, "k": _KEY, "v": _KEY}, "interleaved"
    CONTEXT = {"q": _QUERY}, "split"
    TAPS = {"taps": ("conv_kernel",)}, "whole"
    ONE = {"one": ()}, "whole"

    def __init__(self, blocks: Mapping[str, Directions], laid: str) -> None:
        self.blocks, self.is_sharded, self.is_interleaved = blocks, laid != "whole", laid == "interleaved"

    def size(self, shape: ModelShape, widths: Mapping[Axis, Number]) -> Number:
        """Return the number of rows at `widths`: ints, or expected values (each direction counts linearly)."""
        total: Number = 0
        for block, times in Counter(self.blocks.values()).items():
            rows: Number = times
            for direction in sorted(block, key=lambda one: isinstance(one, Axis)):  # tensors last
                rows = rows * _length(direction, shape, widths)
            total = total + rows
        return total


def _length(direction: Direction, shape: ModelShape, widths: Mapping[Axis, Number]) -> Number:
    """Return the size of one direction, all its parts together."""
    return widths[direction] if isinstance(direction, Axis) else int(getattr(shape, direction))


@dataclass(frozen=True)
class LayerEntry:
    """What one kind of layer holds and uses.

    `parameters`: name after the layer's prefix -> meaning of each dimension. `mixing_flops`: what one token costs
    beside the products with its matrices. `cache`: elements it remembers, as (field of Cost, number), for one sequence.
    Both get the shape, the layer's widths and the length in tokens.
    """

    parameters: Mapping[str, tuple[DimKind, ...]]
    mixing_flops: Callable[[ModelShape, Mapping[Axis, Number], int], Number]
    cache: Callable[[ModelShape, Mapping[Axis, Number], int], Mapping[str, Number]]


# Attention scores average length / 2 keys, products with keys and with values. The recurrence is counted as its state
# update and read: 2 + 2 + 2 per state element. Norms and activations are left out, as in Megatron-Core's own count.
LAYERS = {
    LayerKind.MAMBA: LayerEntry(
        parameters={
            "norm.weight": (DimKind.HIDDEN,),
            "mixer.in_proj.weight": (DimKind.IN_PROJ, DimKind.HIDDEN),
            "mixer.conv1d_weight": (DimKind.CONV, DimKind.ONE, DimKind.TAPS),
            "mixer.conv1d_bias": (DimKind.CONV,),
            "mixer.A_log": (DimKind.MAMBA_HEAD,),
            "mixer.D": (DimKind.MAMBA_HEAD,),
            "mixer.dt_bias": (DimKind.MAMBA_HEAD,),
            "mixer.norm.weight": (DimKind.INNER,),
            "mixer.out_proj.weight": (DimKind.HIDDEN, DimKind.INNER),
        },
        mixing_flops=lambda shape, widths, _: 6 * _length(_N, shape, widths) * DimKind.INNER.size(shape, widths),
        cache=lambda shape, widths, _: {
            "ssm_bytes": _length(_N, shape, widths) * DimKind.INNER.size(shape, widths),
            "conv_bytes": shape.conv_kernel * DimKind.CONV.size(shape, widths),
        },
    ),
    LayerKind.ATTENTION: LayerEntry(
        parameters={
            "input_layernorm.weight": (DimKind.HIDDEN,),
            "self_attention.linear_qkv.weight": (DimKind.QKV, DimKind.HIDDEN),
            "self_attention.linear_proj.weight": (DimKind.HIDDEN, DimKind.CONTEXT),
        },
        mixing_flops=lambda shape, widths, length: 2 * length * DimKind.CONTEXT.size(shape, widths),
        cache=lambda shape, widths, length: {"kv_bytes": 2 * shape.kv_heads * shape.attention_channels * length},
    ),
    LayerKind.MLP: LayerEntry(
        parameters={
            "pre_mlp_layernorm.weight": (DimKind.HIDDEN,),
            "mlp.linear_fc1.weight": (DimKind.FFN, DimKind.HIDDEN),
            "mlp.linear_fc2.weight": (DimKind.HIDDEN, DimKind.FFN),
        },
        mixing_flops=lambda shape, widths, _: 0,
        cache=lambda shape, widths, _: {},
    ),
}
LAYER_PARAMETERS = {name: dims for entry in LAYERS.values() for name, dims in entry.parameters.items()}
MODEL_PARAMETERS = {
    "embedding.word_embeddings.weight": (DimKind.VOCAB, DimKind.HIDDEN),
    "decoder.final_norm.weight": (DimKind.HIDDEN,),
    "output_layer.weight": (DimKind.VOCAB, DimKind.HIDDEN),
}
LAYER_PREFIX = "decoder.layers."
# Trained and stored in fp32 whatever the model's precision (docs/method.md 3).
FP32_PARAMETERS = ("mixer.A_log", "mixer.D")
# What FP8 products on a GPU ask of a weight's rows and columns on a rank.
FP8_MULTIPLE = 16


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


def parameter_names(shape: ModelShape) -> Iterator[str]:
    """Yield the Megatron-Core names of a model's parameters: embedding, layers, final norm, head unless tied."""
    embedding, final_norm, head = MODEL_PARAMETERS
    yield embedding
    for layer_index, kind in enumerate(shape.pattern.kinds):
        yield from (f"{LAYER_PREFIX}{layer_index}.{name}" for name in LAYERS[kind].parameters)
    yield final_norm
    if not shape.tied_embeddings:
        yield head
