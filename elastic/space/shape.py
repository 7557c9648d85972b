"""Sizes of one hybrid model, parent or submodel: every width of every layer in one frozen object."""

from dataclasses import dataclass, fields, replace
from typing import Any

from elastic.space.axes import AXES, INNER_AXIS, LANES, Axis
from elastic.space.pattern import LayerKind, LayerPattern


class ShapeError(ValueError):
    """Sizes that cannot form a model."""


@dataclass(frozen=True)
class ModelShape:
    """All sizes that fix a hybrid model's parameters.

    `ffn`, `mamba_heads` and `attention_heads` hold one width per layer of their kind, in layer order, because a
    submodel's layers may differ. `head_channels` (P) and `attention_channels` (a) are channels of one head.
    """

    pattern: LayerPattern
    vocab: int
    hidden: int
    ffn: tuple[int, ...]
    mamba_heads: tuple[int, ...]
    head_channels: int
    mamba_groups: int
    mamba_state: int
    conv_kernel: int
    attention_heads: tuple[int, ...]
    kv_heads: int
    attention_channels: int
    tied_embeddings: bool = False
    norm_epsilon: float = 1e-5

    @classmethod
    def uniform(cls, pattern: str, *, ffn: int, mamba_heads: int, attention_heads: int, **sizes: Any) -> "ModelShape":
        """Build a shape whose layers of one kind share a width; `sizes` are the remaining fields."""
        parsed = LayerPattern.parse(pattern)
        return cls(
            pattern=parsed,
            ffn=(ffn,) * len(parsed.layers_of(LayerKind.MLP)),
            mamba_heads=(mamba_heads,) * len(parsed.layers_of(LayerKind.MAMBA)),
            attention_heads=(attention_heads,) * len(parsed.layers_of(LayerKind.ATTENTION)),
            **sizes,
        )

    def __post_init__(self) -> None:
        problems = []
        for entry in AXES.values():
            if entry.own and entry.kind is not None:
                count, widths = len(self.pattern.layers_of(entry.kind)), getattr(self, entry.size)
                if len(widths) != count:
                    problems.append(f"{entry.size} has {len(widths)} widths for {count} {entry.kind.name} layers")
        for field in fields(self):
            value = getattr(self, field.name)
            widths = value if isinstance(value, tuple) else (value,)
            if any(type(width) is int and width < 1 for width in widths):
                problems.append(f"{field.name} = {value}: sizes must be at least 1")
        for entry in AXES.values():
            if entry.parts is not None and entry.parts != LANES and (parts := getattr(self, entry.parts)) > 0:
                for width in {width for width in getattr(self, entry.size) if width % parts}:
                    problems.append(f"{entry.size} = {width} is not a multiple of {entry.parts} = {parts}")
        if problems:
            raise ShapeError("model shape: " + "; ".join(problems))

    def width(self, layer_index: int) -> int:
        """Return the inner width of one layer: Mamba heads, FFN neurons or query heads, by its kind."""
        return self.layer_widths(layer_index)[INNER_AXIS[self.pattern.kinds[layer_index]]]

    def layer_widths(self, layer_index: int | None) -> dict[Axis, int]:
        """Return the width along every axis that one layer has; None: outside the layers."""
        return layer_widths(self, self.pattern, layer_index)

    def with_vocab(self, vocab: int) -> "ModelShape":
        """Return the same shape over another vocabulary size."""
        return replace(self, vocab=vocab)


def layer_widths(sizes: object, pattern: LayerPattern, layer_index: int | None) -> dict[Axis, int]:
    """Read one layer's width along every axis that it has from `sizes`, whose fields are named as in AXES."""
    kind = None if layer_index is None else pattern.kinds[layer_index]
    ordinal = 0 if layer_index is None else pattern.ordinal(layer_index)
    return {
        axis: getattr(sizes, entry.size)[ordinal] if entry.own else getattr(sizes, entry.size)
        for axis, entry in AXES.items()
        if entry.kind is None or entry.kind is kind
    }
