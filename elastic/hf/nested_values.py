"""Check an exported file value by value against the parent, from docs/design.md 2 said a second time.

Nothing here uses the code that cuts, pads and renames: each row and column of an exported tensor names the parent's
row and column it must come from (-1: a zero of the padding), and the values are compared where they lie.

Legend: G Mamba groups, H heads, P head channels, N state, I = H*P, KV key-value heads, Q queries of one KV head,
a attention channels, F ffn; the parent's in upper case, kept widths in lower case.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from elastic.hf.config import ExportError, export_shape
from elastic.hf.export import CheckOutcome, FolderCheck
from elastic.hf.folder import HfFolder
from elastic.rank.slicing import TensorSource, reader
from elastic.space.axes import LayerKind
from elastic.space.shape import ModelShape, Subnet

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Origin:
    """Where an exported tensor's values come from: `rows` and `columns` (None: a vector) of a parent's parameter."""

    parameter: str
    rows: Tensor
    columns: Tensor | None = None

    def values(self, parent: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the values [rows, columns] of rows start to stop, from the parent's parameter; padding is 0."""
        values, rows = parent.reshape(parent.shape[0], -1), self.rows[start:stop]
        columns = torch.arange(values.shape[1]) if self.columns is None else self.columns
        found = values[rows.clamp(min=0)][:, columns.clamp(min=0)]
        found[rows < 0] = 0
        found[:, columns < 0] = 0
        return found


def value_check(parent_tensors: TensorSource, parent: ModelShape, subnet: Subnet, lanes: int) -> FolderCheck:
    """Return the check that compares every value with the parent's, converted to the exported number format.

    One tensor is in memory at a time. It raises ExportError naming the tensor, and the first row that differs.
    """
    read = reader(parent_tensors)

    def check(written: HfFolder, shape: ModelShape) -> CheckOutcome:
        count = 0
        for name, origin in nested_origins(parent, subnet, lanes, export_shape(shape)):
            tensor = written.tensors[name]
            _check_tensor(name, tensor, read(origin.parameter), origin)
            count += tensor.numel()
        sentence = (
            f"All {count:,} stored values were read back and compared with the parent's values at their nested index; "
            f"logits were not compared."
        )
        return CheckOutcome("every stored value against the parent's at its nested index", sentence, num_values=count)

    return check


def _check_tensor(name: str, tensor: Tensor, parent: Tensor, origin: Origin) -> None:
    rows = tensor.reshape(tensor.shape[0], -1)
    num_columns = parent[0].numel() if origin.columns is None else origin.columns.numel()
    if tuple(rows.shape) != (origin.rows.numel(), num_columns):
        kept = f"{origin.rows.numel()} x {num_columns}; nothing was written"
        raise ExportError(f"{name} is {tuple(rows.shape)}, the subnet keeps {kept}")
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        differs = (rows[start:stop] != origin.values(parent, start, stop).to(tensor.dtype)).any(dim=1).nonzero()
        if differs.numel():
            row = start + int(differs[0])
            raise ExportError(
                f"{name}: row {row} is not row {int(origin.rows[row])} of {origin.parameter}; nothing was written"
            )


def nested_origins(parent: ModelShape, subnet: Subnet, lanes: int, stored: ModelShape) -> Iterator[tuple[str, Origin]]:
    """Yield (Hugging Face name, origin) of every tensor of the subnet's file; `stored` is its shape with padding."""
    hidden, vocab = torch.arange(subnet.hidden), torch.arange(stored.vocab)
    yield "backbone.embeddings.weight", Origin("embedding.word_embeddings.weight", vocab, hidden)
    for number, layer in enumerate(subnet.kept_layers):
        kind, width = parent.pattern.kinds[layer], subnet.width(parent, layer)
        match kind:
            case LayerKind.MLP:
                origins = _mlp(parent.width(layer), width, stored.width(number), lanes, hidden)
            case LayerKind.MAMBA:
                origins = _mamba(parent, parent.width(layer), width, subnet.head_channels, hidden)
            case LayerKind.ATTENTION:
                origins = _attention(parent, parent.width(layer), width, stored.width(number), hidden)
        for name, origin in origins:
            full_name = f"decoder.layers.{layer}.{origin.parameter}"
            yield f"backbone.layers.{number}.{name}", replace(origin, parameter=full_name)
    yield "backbone.norm_f.weight", Origin("decoder.final_norm.weight", hidden)
    head = "embedding.word_embeddings.weight" if parent.tied_embeddings else "output_layer.weight"
    yield "lm_head.weight", Origin(head, vocab, hidden)


def _mlp(full: int, kept: int, stored: int, lanes: int, hidden: Tensor) -> Iterator[tuple[str, Origin]]:
    """Width f keeps the first f/lanes neurons of each lane; neurons beyond f are zeros."""
    lane = torch.arange(lanes).unsqueeze(1) * (full // lanes)
    neurons = pad((lane + torch.arange(kept // lanes)).flatten(), (0, stored - kept), value=-1)
    yield "norm.weight", Origin("pre_mlp_layernorm.weight", hidden)
    yield "mixer.up_proj.weight", Origin("mlp.linear_fc1.weight", neurons, hidden)
    yield "mixer.down_proj.weight", Origin("mlp.linear_fc2.weight", hidden, neurons)


def _mamba(shape: ModelShape, full: int, kept: int, p: int, hidden: Tensor) -> Iterator[tuple[str, Origin]]:
    """The first h/G heads of each group and the first p channels of each head; rows [z, x, B, C, dt]."""
    groups, channels, state = shape.mamba_groups, shape.head_channels, 2 * shape.mamba_groups * shape.mamba_state
    heads = (torch.arange(groups).unsqueeze(1) * (full // groups) + torch.arange(kept // groups)).flatten()
    inner = (heads.unsqueeze(1) * channels + torch.arange(p)).flatten()
    d_inner = full * channels
    b_and_c = torch.arange(state)
    rows = torch.cat([inner, d_inner + inner, 2 * d_inner + b_and_c, 2 * d_inner + state + heads])
    convolved = torch.cat([inner, d_inner + b_and_c])
    yield "norm.weight", Origin("norm.weight", hidden)
    yield "mixer.in_proj.weight", Origin("mixer.in_proj.weight", rows, hidden)
    yield "mixer.conv1d.weight", Origin("mixer.conv1d_weight", convolved)
    yield "mixer.conv1d.bias", Origin("mixer.conv1d_bias", convolved)
    for name in ("A_log", "D", "dt_bias"):
        yield f"mixer.{name}", Origin(f"mixer.{name}", heads)
    yield "mixer.norm.weight", Origin("mixer.norm.weight", inner)
    yield "mixer.out_proj.weight", Origin("mixer.out_proj.weight", hidden, inner)


def _attention(shape: ModelShape, full: int, kept: int, stored: int, hidden: Tensor) -> Iterator[tuple[str, Origin]]:
    """The first q/KV query heads of each KV group, rows [q.., k, v] a group; heads beyond them are zeros."""
    groups, a, queries = shape.kv_heads, shape.attention_channels, full // shape.kv_heads

    def head_rows(first_head: Tensor, num_heads: int, num_stored: int) -> Tensor:  # [KV] -> [KV * stored * a]
        heads = first_head.unsqueeze(1) + torch.arange(num_stored)
        rows = heads.unsqueeze(2) * a + torch.arange(a)
        rows[:, num_heads:] = -1
        return rows.flatten()

    group = torch.arange(groups)
    in_fused, in_context = group * (queries + 2), group * queries
    per_group = (kept // groups, stored // groups)
    fused = "self_attention.linear_qkv.weight"
    yield "norm.weight", Origin("input_layernorm.weight", hidden)
    yield "mixer.q_proj.weight", Origin(fused, head_rows(in_fused, *per_group), hidden)
    yield "mixer.k_proj.weight", Origin(fused, head_rows(in_fused + queries, 1, 1), hidden)
    yield "mixer.v_proj.weight", Origin(fused, head_rows(in_fused + queries + 1, 1, 1), hidden)
    context = head_rows(in_context, *per_group)
    yield "mixer.o_proj.weight", Origin("self_attention.linear_proj.weight", hidden, context)
