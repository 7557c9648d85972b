"""The one name table between Megatron-Core and stock `nemotron_h` files, and the few typed operations beside it.

Everything is a rename except three things: the fused query-key-value weight (split per KV group), layers narrower
than the widest of their kind (zero-padded, because the stock config knows one integer per width), and a tied head
(stock transformers does not tie `nemotron_h`, so a file always carries the head).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from elastic.hf.config import export_shape
from elastic.rank.slicing import TensorSource, cut_parameter, reader
from elastic.space.layers import parameter_dims, parameter_names, split_parameter_name
from elastic.space.nesting import Cut, Grid, kept_indices, parameter_size
from elastic.space.shape import ModelShape

PREFIX = "backbone."  # in a file; a loaded stock model's state_dict has "model."
HF_HEAD = "lm_head.weight"
_EMBEDDING = "embedding.word_embeddings.weight"
_LOOKED_AT_ONCE = 2**24  # values: looking at all of an embedding takes twice its own memory

# Megatron-Core name -> Hugging Face name(s).
MODEL_NAMES: dict[str, tuple[str, ...]] = {
    _EMBEDDING: (PREFIX + "embeddings.weight",),
    "decoder.final_norm.weight": (PREFIX + "norm_f.weight",),
    "output_layer.weight": (HF_HEAD,),
}
# The same inside layer i: after `decoder.layers.i.` on the left, after `backbone.layers.i.` on the right.
LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "norm.weight": ("norm.weight",),
    "mixer.in_proj.weight": ("mixer.in_proj.weight",),
    "mixer.conv1d_weight": ("mixer.conv1d.weight",),
    "mixer.conv1d_bias": ("mixer.conv1d.bias",),
    "mixer.A_log": ("mixer.A_log",),
    "mixer.D": ("mixer.D",),
    "mixer.dt_bias": ("mixer.dt_bias",),
    "mixer.norm.weight": ("mixer.norm.weight",),
    "mixer.out_proj.weight": ("mixer.out_proj.weight",),
    "input_layernorm.weight": ("norm.weight",),
    "self_attention.linear_qkv.weight": ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
    "self_attention.linear_proj.weight": ("mixer.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("norm.weight",),
    "mlp.linear_fc1.weight": ("mixer.up_proj.weight",),
    "mlp.linear_fc2.weight": ("mixer.down_proj.weight",),
}


class HfTensorError(ValueError):
    """Hugging Face tensors that are missing, left over, of a wrong size, or mean another model than they say."""


def hf_names(name: str) -> tuple[str, ...]:
    """Return the Hugging Face name(s) of a Megatron-Core parameter; raises KeyError for an unknown name."""
    layer_index, rest = split_parameter_name(name)
    if layer_index is None:
        return MODEL_NAMES[rest]
    return tuple(f"{PREFIX}layers.{layer_index}.{hf_rest}" for hf_rest in LAYER_NAMES[rest])


def hf_sizes(shape: ModelShape, *, padding: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the size of every tensor of the Hugging Face file of `shape`, in file order, padding included.

    Without `padding`, which a stock config asks for, layers keep their widths. Raises ExportError if the shape has no
    stock form.
    """
    padded = export_shape(shape) if padding else shape
    key = padded.kv_heads * padded.attention_channels
    sizes: dict[str, tuple[int, ...]] = {}
    for name in parameter_names(padded):
        names, (rows, *columns) = hf_names(name), parameter_size(name, padded)
        parts = (rows,) if len(names) == 1 else (rows - 2 * key, key, key)
        sizes |= {hf_name: (part, *columns) for hf_name, part in zip(names, parts, strict=True)}
    return sizes | {HF_HEAD: (shape.vocab, shape.hidden)}


def to_hf(source: TensorSource, shape: ModelShape, *, padding: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for a model given under Megatron-Core names, one tensor at a time.

    With `padding`, layers narrower than the widest of their kind are zero-padded: exact for FFN neurons, since
    relu(0)^2 = 0, and for query heads, since their output columns are 0. Raises ExportError if Mamba widths differ,
    ValueError if a tensor has the wrong size.
    """
    padded, read = export_shape(shape) if padding else shape, reader(source)
    written = [(name, hf_names(name)) for name in parameter_names(shape)]
    written += [(_EMBEDDING, (HF_HEAD,))] if shape.tied_embeddings else []

    def stored(name: str, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        tensor = pad_parameter(read(name), name, shape, padded)
        parts = split_qkv(tensor, padded.kv_heads, padded.attention_channels) if len(names) == 3 else (tensor,)
        return zip(names, parts, strict=True)

    # Nothing holds a tensor here, so that one is gone before the next is read.
    return chain.from_iterable(stored(*entry) for entry in written)


def from_hf(tensors: Mapping[str, Tensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield (Megatron-Core name, tensor) for a stock model, one tensor at a time; undoes `to_hf` bit for bit.

    Raises HfTensorError as `megatron_source` does.
    """
    read = megatron_source(tensors, shape)
    return ((name, read(name)) for name in parameter_names(shape))


def megatron_source(tensors: Mapping[str, Tensor], shape: ModelShape) -> Callable[[str], Tensor]:
    """Return a function that gives one Megatron-Core tensor of a stock model by its name.

    `tensors` has all names of a file (`backbone.`) or of a loaded model (`model.`). Raises HfTensorError for a tied
    model whose stored head is not its embedding, and, when a tensor is asked for, for a wrong size, values that are not
    finite, or padding that is not zero.
    """
    padded, sizes, stored = export_shape(shape), hf_sizes(shape), stored_names(tensors)

    def checked(hf_name: str) -> Tensor:
        tensor = tensors[stored[hf_name]]
        if tuple(tensor.shape) != sizes[hf_name]:
            raise HfTensorError(f"{hf_name} is {tuple(tensor.shape)}, the config says {sizes[hf_name]}")
        if wrong := sum(int(part.isfinite().logical_not().sum()) for part in tensor.reshape(-1).split(_LOOKED_AT_ONCE)):
            raise HfTensorError(f"{hf_name} is damaged: {wrong} of its {tensor.numel()} values are NaN or infinite")
        return tensor

    def ours(name: str) -> Tensor:
        parts = [checked(hf_name) for hf_name in hf_names(name)]
        tensor = parts[0] if len(parts) == 1 else merge_qkv(parts, padded.kv_heads, padded.attention_channels)
        return unpad_parameter(tensor, name, shape, padded)

    if shape.tied_embeddings and HF_HEAD in stored:
        if not torch.equal(*(tensors[stored[hf_name]] for hf_name in (HF_HEAD, *MODEL_NAMES[_EMBEDDING]))):
            raise HfTensorError(
                f"config says tie_word_embeddings, but {HF_HEAD} differs from the embedding, and stock transformers "
                f"uses the two as they are; set tie_word_embeddings to false"
            )
    return ours


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Map the file's name of each tensor to the name it is stored under, in a file or in a loaded model."""
    return {re.sub(r"^model\.", PREFIX, name): name for name in names}


def split_qkv(fused: Tensor, kv_heads: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [KV * (q/KV + 2) * a, D], per KV group (q.., k, v), into q, k and v of all groups."""
    rows = fused.reshape(kv_heads, -1, channels, fused.shape[-1])
    query, key, value = (part.reshape(-1, fused.shape[-1]) for part in rows.split([rows.shape[1] - 2, 1, 1], dim=1))
    return query, key, value


def merge_qkv(parts: Sequence[Tensor], kv_heads: int, channels: int) -> Tensor:
    """Undo `split_qkv`; `parts` are query, key and value."""
    grids = [part.reshape(kv_heads, -1, channels, part.shape[-1]) for part in parts]
    return torch.cat(grids, dim=1).reshape(-1, parts[0].shape[-1])


def pad_parameter(tensor: Tensor, name: str, shape: ModelShape, padded: ModelShape) -> Tensor:
    """Place a parameter of `shape` into zeros of `padded`'s size; the same tensor where nothing is added.

    New FFN neurons come last; new query heads come last inside each KV group, so that the heads of a group keep
    their key and value. Raises ValueError if the tensor does not have the size that `shape` gives it.
    """
    if tuple(tensor.shape) != parameter_size(name, shape):
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {parameter_size(name, shape)}")
    cut = _padding_cut(name, shape, padded)
    for dim, kind in enumerate(parameter_dims(name)):
        tensor = _pad(tensor, dim, cut.grid(kind))
    return tensor


def pad_rows(rows: Tensor, name: str, shape: ModelShape, padded: ModelShape) -> Tensor:
    """Place what belongs to the rows of a parameter of `shape` [R, ...] as `pad_parameter` places the rows."""
    return _pad(rows, 0, _padding_cut(name, shape, padded).grid(parameter_dims(name)[0]))


def _pad(tensor: Tensor, dim: int, grid: Grid) -> Tensor:
    if grid.is_whole:
        return tensor
    size = list(tensor.shape)
    size[dim] = grid.full_size
    return tensor.new_zeros(size).index_copy(dim, kept_indices(grid).to(tensor.device), tensor)


def unpad_parameter(tensor: Tensor, name: str, shape: ModelShape, padded: ModelShape) -> Tensor:
    """Undo `pad_parameter`; raises HfTensorError if a value that would be dropped is not zero."""
    layer_index, _ = split_parameter_name(name)
    kept = cut_parameter(tensor, name, _padding_cut(name, shape, padded))
    if layer_index is None or kept.shape == tensor.shape:
        return tensor
    if torch.count_nonzero(tensor) != torch.count_nonzero(kept):
        raise HfTensorError(f"{name}: the padding beyond width {shape.width(layer_index)} is not zero")
    return kept.clone()


def _padding_cut(name: str, shape: ModelShape, padded: ModelShape) -> Cut:
    """Return the cut from the padded layer back to the real one; it keeps all where nothing is padded."""
    layer_index, _ = split_parameter_name(name)
    return Cut.of_layer(padded, layer_index, shape.layer_widths(layer_index))
