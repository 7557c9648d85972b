"""Write a model as a GGUF file, as llama.cpp reads `nemotron_h`, and check such a file value by value.

llama.cpp takes FFN widths and query heads layer by layer, so nothing is padded, and a tied head is not stored twice.
Matrices have the format that is asked for, what acts element by element has fp32.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from torch import Tensor

from elastic.hf.card import CardInfo, gguf_card
from elastic.hf.config import ExportError, export_shape
from elastic.hf.export import CheckOutcome, ExportReport, export_errors, unfilled, written_and_checked
from elastic.hf.export_settings import ExportSettings, kind_of_tensor
from elastic.hf.folder import CARD_FILE
from elastic.hf.gguf_tokenizer import add_tokenizer
from elastic.hf.names import HF_HEAD, PREFIX, hf_sizes, to_hf
from elastic.hf.nested_values import nested_origins
from elastic.rank.slicing import TensorSource, reader
from elastic.space.axes import LayerKind
from elastic.space.cost import shape_cost
from elastic.space.shape import ModelShape, Subnet

ARCHITECTURE = "nemotron_h"
# What a file can be of: the format of its matrices, and what the file says of itself.
FORMATS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# Hugging Face name -> llama.cpp's; inside layer i after `backbone.layers.i.` on the left, after `blk.i.` on the right.
MODEL_NAMES = {
    PREFIX + "embeddings.weight": "token_embd.weight",
    PREFIX + "norm_f.weight": "output_norm.weight",
    HF_HEAD: "output.weight",
}
LAYER_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
}
# What llama.cpp keeps in another size than the Hugging Face file: A and D as columns, the convolution without its
# middle dimension, the gated norm by groups. All of it, and every vector, in fp32.
_SIZES: dict[str, Callable[[ModelShape, tuple[int, ...]], tuple[int, ...]]] = {
    "mixer.A_log": lambda shape, size: (*size, 1),
    "mixer.D": lambda shape, size: (*size, 1),
    "mixer.conv1d.weight": lambda shape, size: (size[0], shape.conv_kernel),
    "mixer.norm.weight": lambda shape, size: (shape.mamba_groups, size[0] // shape.mamba_groups),
}
_ROWS_AT_ONCE = 4096
# Of the largest value of a block: half a step of 1/127, and the rounding of the step to f16; that of a step below
# f16's smallest normal number is half of 2^-24, up to 127 times, however small the values are.
_Q8_0_ERROR, _Q8_0_LEAST = 0.5 / 127 + 2**-11, 127 * 2**-25


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file before it exists: its size, row by row, and the format of its values."""

    size: tuple[int, ...]
    form: GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its values."""
        block, block_bytes = GGML_QUANT_SIZES[self.form]
        return math.prod(self.size) // block * block_bytes


def gguf_name(hf_name: str) -> str:
    """Return llama.cpp's name of a tensor given by its Hugging Face name; raises KeyError for an unknown one."""
    if hf_name in MODEL_NAMES:
        return MODEL_NAMES[hf_name]
    layer = hf_name.removeprefix(PREFIX + "layers.").partition(".")[0]
    return f"blk.{layer}.{LAYER_NAMES[kind_of_tensor(hf_name)]}"


def gguf_plan(shape: ModelShape, matrices: str) -> dict[str, GgufTensor]:
    """Return every tensor of `shape`'s file with `matrices` of one of FORMATS, by Hugging Face name, in file order.

    Rows that cannot be cut into Q8_0's blocks of 32 stay f16, as llama.cpp does it. Raises ExportError if Mamba widths
    differ between layers.
    """
    export_shape(shape)  # llama.cpp, too, has one number of Mamba heads for all layers
    plan = {}
    for name, size in hf_sizes(shape, padding=False).items():
        if name == HF_HEAD and shape.tied_embeddings:
            continue
        form, kind_of = FORMATS[matrices][0], kind_of_tensor(name)
        if kind_of in _SIZES or len(size) == 1:
            form = GGMLQuantizationType.F32
        elif size[-1] % GGML_QUANT_SIZES[form][0]:
            form = GGMLQuantizationType.F16
        plan[name] = GgufTensor(_SIZES[kind_of](shape, size) if kind_of in _SIZES else size, form)
    return plan


def gguf_bytes(shape: ModelShape, kinds: Sequence[str]) -> int:
    """Return the bytes that the tensors of these files take."""
    return sum(tensor.num_bytes for kind in kinds for tensor in gguf_plan(shape, kind).values())


# Judges a GGUF file of a model of a shape, given its kind, when it is written but not yet in its place (gguf_check is
# one); raises ExportError if it is not what was meant to be written.
GgufCheck = Callable[[Path, str, ModelShape], CheckOutcome]


def export_gguf(
    source: TensorSource,
    shape: ModelShape,
    folder: Path,
    card: CardInfo,
    exports: ExportSettings,
    name: str,
    kinds: Sequence[str],
    check: GgufCheck,
    progress: Callable[[int, int], None] = lambda num_bytes, total: None,
) -> ExportReport:
    """Write a folder with `name`-KIND.gguf for each of `kinds` (keys of FORMATS) and a card.

    Streams, checks, renames and fails as `export_folder` does. `progress` is told of each file anew, while it is
    written.
    """
    without_fillers, exported = unfilled(source, shape, exports)
    files = {f"{name}-{kind.upper()}.gguf": kind for kind in kinds}

    def write(aside: Path) -> CheckOutcome:
        outcomes = []
        for file, kind in files.items():
            write_gguf(without_fillers, exported, aside / file, kind, card.title, exports, progress)
            outcomes.append(check(aside / file, kind, exported))
        sentence = " ".join(outcome.sentence for outcome in outcomes)
        sizes = {kind: gguf_bytes(exported, [kind]) for kind in kinds}
        (aside / CARD_FILE).write_text(gguf_card(card, exported, exports, files, sentence, sizes))
        engines = tuple(said for outcome in outcomes for said in outcome.engines)
        return replace(outcomes[0], sentence=sentence, engines=engines)

    with export_errors(folder):
        outcome = written_and_checked(folder, gguf_bytes(exported, kinds), exports, exported.vocab, write)
    cost = shape_cost(exported)
    return ExportReport(folder, int(cost.params), int(cost.params), outcome)


def write_gguf(
    source: TensorSource,
    shape: ModelShape,
    path: Path,
    kind: str,
    title: str,
    exports: ExportSettings,
    progress: Callable[[int, int], None] = lambda num_bytes, total: None,
) -> None:
    """Write `shape`'s tensors, given under Megatron-Core names, to `path`; streams: one tensor in memory.

    `progress` is told the bytes of each tensor that is written, and of all. Raises ExportError for values that f16
    cannot hold, for Mamba widths that differ, and for a tokenizer that llama.cpp would read otherwise.
    """
    plan = gguf_plan(shape, kind)
    total = gguf_bytes(shape, [kind])
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it announces every file and its byte order
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        _add_sizes(writer, shape)
        writer.add_name(title)
        writer.add_context_length(exports.settings.max_position_embeddings)
        writer.add_file_type(FORMATS[kind][1])
        writer.add_quantization_version(2)
        add_tokenizer(writer, exports, shape.vocab)
        for name, tensor in plan.items():
            dtype = np.dtype(np.float32)  # not looked at: the format is given
            writer.add_tensor_info(gguf_name(name), tensor.size, dtype, tensor.num_bytes, tensor.form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, given in to_hf(source, shape, padding=False):
            if (wanted := plan.pop(name, None)) is not None:  # None: a tied head's copy
                writer.write_tensor_data(_encoded(name, _in_file(name, given, wanted.size), wanted.form))
                progress(wanted.num_bytes, total)
            del given  # before the next one is read
        assert not plan, "the writer takes tensors in the order in which they were announced"
    finally:
        writer.close()


def gguf_check(
    path: Path,
    parent_tensors: TensorSource,
    parent: ModelShape,
    subnet: Subnet,
    lanes: int,
    shape: ModelShape,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> CheckOutcome:
    """Read a file back and compare every value with the parent's at its nested index (nested_values.py).

    Values in fp32, f16 and bf16 must be the parent's, rounded; those in Q8_0 within half a step. One tensor of the
    parent is in memory at a time. `progress` is told the file's bytes that were compared. Raises ExportError naming the
    tensor.
    """
    read, count, sizes = reader(parent_tensors), 0, gguf_plan(shape, "f32")
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, origin in nested_origins(parent, subnet, lanes, shape):
        if name not in sizes:  # a tied head's copy
            continue
        found = stored.pop(gguf_name(name), None)
        if found is None:
            raise ExportError(f"{path.name} lacks {gguf_name(name)}; nothing was written")
        expected = _in_file(name, origin.values(read(origin.parameter)), sizes[name].size)
        values = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type))).reshape(expected.shape)
        for start in range(0, expected.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            if not _same(values[rows], expected[rows].float(), found.tensor_type):
                raise ExportError(f"{path.name}: {gguf_name(name)} is not {origin.parameter}'s; nothing was written")
        progress(found.data.nbytes)
        count += expected.numel()
    if stored:
        raise ExportError(f"{path.name} holds tensors of no parameter: {', '.join(list(stored)[:4])}")
    sentence = f"{path.name}: all {count:,} values were read back and compared with the parent's at their nested index."
    return CheckOutcome("every stored value against the parent's at its nested index", sentence, num_values=count)


def _in_file(name: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a tensor as llama.cpp keeps it: A itself in place of its logarithm, everything in the file's size."""
    return (-tensor.float().exp() if name.endswith("mixer.A_log") else tensor).reshape(size)


def _encoded(name: str, tensor: Tensor, form: GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of a tensor in its format; raises ExportError for values that it cannot hold."""
    parts = []
    for rows in tensor.detach().cpu().split(_ROWS_AT_ONCE):
        with np.errstate(over="ignore"):
            parts.append(quantize(rows.float().numpy(), form))
        if form == GGMLQuantizationType.F16 and not np.isfinite(parts[-1]).all():
            raise ExportError(f"{gguf_name(name)} has values beyond f16's largest, 65504; write bf16 or f32")
    return np.concatenate(parts)


def _same(values: Tensor, expected: Tensor, form: GGMLQuantizationType) -> bool:
    if form == GGMLQuantizationType.Q8_0:
        blocks = expected.reshape(-1, GGML_QUANT_SIZES[form][0])
        error = (values.reshape(blocks.shape) - blocks).abs()
        return bool((error <= _Q8_0_ERROR * blocks.abs().amax(dim=1, keepdim=True) + _Q8_0_LEAST).all())
    rounded = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    return torch.equal(values, expected.to(rounded.get(form, torch.float32)).float())


def _add_sizes(writer: GGUFWriter, shape: ModelShape) -> None:
    """Say every size: what differs between layers as a list over all layers."""
    heads = dict(zip(shape.pattern.layers_of(LayerKind.ATTENTION), shape.attention_heads, strict=True))
    ffn = dict(zip(shape.pattern.layers_of(LayerKind.MLP), shape.ffn, strict=True))
    layers = range(len(shape.pattern))
    mamba_heads = max(shape.mamba_heads, default=shape.mamba_groups)
    writer.add_block_count(len(layers))
    writer.add_vocab_size(shape.vocab)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length([ffn.get(layer, 0) for layer in layers])
    # llama.cpp takes key_length only where layer 0 has heads: layers without attention say what the widest has.
    writer.add_head_count([heads.get(layer, max(shape.attention_heads, default=shape.kv_heads)) for layer in layers])
    writer.add_head_count_kv([shape.kv_heads * (layer in heads) for layer in layers])
    writer.add_key_length(shape.attention_channels)
    writer.add_value_length(shape.attention_channels)
    writer.add_layer_norm_eps(shape.norm_epsilon)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.attention_channels)
    writer.add_ssm_conv_kernel(shape.conv_kernel)
    writer.add_ssm_inner_size(mamba_heads * shape.head_channels)
    writer.add_ssm_state_size(shape.mamba_state)
    writer.add_ssm_time_step_rank(mamba_heads)
    writer.add_ssm_group_count(shape.mamba_groups)
