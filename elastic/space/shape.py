"""Sizes of one hybrid model, parent or submodel: every width of every layer in one frozen object."""

from dataclasses import dataclass, fields, replace
from typing import Any

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
        for kind, name in WIDTH_FIELD.items():
            count, widths = len(self.pattern.layers_of(kind)), getattr(self, name)
            if len(widths) != count:
                problems.append(f"{name} has {len(widths)} widths for {count} {kind.name} layers")
        for field in fields(self):
            value = getattr(self, field.name)
            widths = value if isinstance(value, tuple) else (value,)
            if any(type(width) is int and width < 1 for width in widths):
                problems.append(f"{field.name} = {value}: sizes must be at least 1")
        for width in set(self.mamba_heads):
            if self.mamba_groups > 0 and width % self.mamba_groups:
                problems.append(f"mamba_heads = {width} is not a multiple of mamba_groups = {self.mamba_groups}")
        for width in set(self.attention_heads):
            if self.kv_heads > 0 and width % self.kv_heads:
                problems.append(f"attention_heads = {width} is not a multiple of kv_heads = {self.kv_heads}")
        if problems:
            raise ShapeError("model shape: " + "; ".join(problems))

    def width(self, layer_index: int) -> int:
        """Return the inner width of one layer: Mamba heads, FFN neurons or query heads, by its kind."""
        kind = self.pattern.kinds[layer_index]
        return getattr(self, WIDTH_FIELD[kind])[self.pattern.ordinal(layer_index)]

    def with_vocab(self, vocab: int) -> "ModelShape":
        """Return the same shape over another vocabulary size."""
        return replace(self, vocab=vocab)


WIDTH_FIELD = {
    LayerKind.MAMBA: "mamba_heads",
    LayerKind.MLP: "ffn",
    LayerKind.ATTENTION: "attention_heads",
}
