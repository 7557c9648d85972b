"""Layer kinds, and the table of axes: what each one narrows. Adding one: docs/extending.md."""

from dataclasses import dataclass
from enum import StrEnum


class LayerKind(StrEnum):
    """One character of a hybrid layer pattern."""

    MAMBA = "M"
    MLP = "-"
    ATTENTION = "*"


class Axis(StrEnum):
    """One elastic dimension."""

    HIDDEN = "hidden"
    FFN = "ffn"
    MAMBA_HEAD = "mamba_head"
    MAMBA_CHANNEL = "mamba_channel"
    ATTENTION_HEAD = "attention_head"
    DEPTH = "depth"


@dataclass(frozen=True)
class AxisEntry:
    """What an axis narrows, and where its widths stand.

    `size` names the field of ModelShape and Subnet that holds the width. `kind`: the layers that have this width, None
    for the residual stream, which all layers share. `own`: every layer of the kind has a width of its own, and may have
    a choice of its own. `parts` names what a width is dealt over in equal shares, of which a tensor-parallel rank holds
    whole ones: a field of ModelShape, or the space's `lanes`. None: every rank holds the whole width. `ranking` names
    the orders of a ranking (rank/permutation.py), None: prefixes are taken in the parent's own order.
    """

    size: str
    kind: LayerKind | None = None
    own: bool = False
    parts: str | None = None
    ranking: str | None = None


LANES = "lanes"
# Depth stands apart: it keeps layers, not a part of each.
AXES = {
    Axis.HIDDEN: AxisEntry("hidden", ranking="hidden"),
    Axis.FFN: AxisEntry("ffn", LayerKind.MLP, own=True, parts=LANES, ranking="ffn"),
    Axis.MAMBA_HEAD: AxisEntry("mamba_heads", LayerKind.MAMBA, own=True, parts="mamba_groups", ranking="mamba_heads"),
    Axis.MAMBA_CHANNEL: AxisEntry("head_channels", LayerKind.MAMBA, ranking="mamba_channels"),
    Axis.ATTENTION_HEAD: AxisEntry(
        "attention_heads", LayerKind.ATTENTION, own=True, parts="kv_heads", ranking="attention_heads"
    ),
}
# Their gates act on the residual stream, not inside a layer.
STREAM_AXES = (*(axis for axis, entry in AXES.items() if entry.kind is None), Axis.DEPTH)
# What sizes a layer of each kind: neurons or heads.
INNER_AXIS = {entry.kind: axis for axis, entry in AXES.items() if entry.own and entry.kind is not None}
