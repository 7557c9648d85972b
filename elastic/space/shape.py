"""Sizes of hybrid models: the layer pattern, parsed here and nowhere else, a model, and a subnet inside a parent."""

from dataclasses import dataclass, fields, replace
from typing import Any

from elastic.space.axes import AXES, INNER_AXIS, LANES, Axis, LayerKind


class PatternError(ValueError):
    """A layer pattern holds a character this project does not know, or no layer at all."""


class ShapeError(ValueError):
    """Sizes that cannot form a model."""


class SubnetError(ValueError):
    """A subnet that does not fit in its parent."""


@dataclass(frozen=True)
class LayerPattern:
    """Order of the layers, for example ``M-M*-``.

    ``|`` marks a pipeline boundary in Megatron-Core's notation; it is not a layer and is kept only in `segments`.
    """

    kinds: tuple[LayerKind, ...]
    segments: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "LayerPattern":
        """Read `text`; raises PatternError for an unknown character, an empty pattern or an empty segment."""
        known = {kind.value: kind for kind in LayerKind}
        for position, character in enumerate(text):
            if character not in known and character != "|":
                raise PatternError(
                    f"layer pattern {text!r}: character {character!r} at position {position} is not one of "
                    f"{' '.join(known)} (and | between pipeline stages). Mixture-of-experts and "
                    f"multi-token-prediction layers are not supported."
                )
        segments = tuple(len(segment) for segment in text.split("|"))
        if 0 in segments:
            raise PatternError(f"layer pattern {text!r} is empty or has an empty pipeline segment")
        return cls(tuple(known[character] for character in text if character != "|"), segments)

    def __str__(self) -> str:
        return "".join(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def layers_of(self, kind: LayerKind) -> tuple[int, ...]:
        """List the global layer indices of one kind, ascending."""
        return tuple(index for index, other in enumerate(self.kinds) if other is kind)

    def ordinal(self, layer_index: int) -> int:
        """Return the position of `layer_index` among the layers of its own kind."""
        return self.kinds[:layer_index].count(self.kinds[layer_index])

    def select(self, kept_layers: tuple[int, ...]) -> "LayerPattern":
        """Return the pattern of the kept layers in their original order, without pipeline boundaries."""
        return LayerPattern(tuple(self.kinds[index] for index in kept_layers), (len(kept_layers),))


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

    def mean_width(self, axis: Axis) -> float:
        """Return the width on an axis, a mean where layers have their own (0: none there); of depth, the layers."""
        if axis is Axis.DEPTH:
            return len(self.pattern)
        width = getattr(self, AXES[axis].size)
        return sum(width) / max(len(width), 1) if isinstance(width, tuple) else width

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
        if entry.kind in (None, kind)
    }


@dataclass(frozen=True)
class Subnet:
    """The parent run at a choice.

    `ffn`, `mamba_heads` and `attention_heads` hold one width per **parent** layer of that kind; the entry of a
    skipped layer is ignored. `kept_layers` are global layer indices, ascending.
    """

    hidden: int
    ffn: tuple[int, ...]
    mamba_heads: tuple[int, ...]
    head_channels: int
    attention_heads: tuple[int, ...]
    kept_layers: tuple[int, ...]

    @classmethod
    def full(cls, parent: ModelShape) -> "Subnet":
        """Return the subnet that is the whole parent."""
        sizes: dict[str, Any] = {entry.size: getattr(parent, entry.size) for entry in AXES.values()}
        return cls(**sizes, kept_layers=tuple(range(len(parent.pattern))))

    def shape(self, parent: ModelShape) -> ModelShape:
        """Return the shape of the submodel cut from `parent`; raises SubnetError if it does not fit inside."""
        problems, sizes = [], dict[str, Any]()
        for entry in AXES.values():
            name, chosen, full = entry.size, getattr(self, entry.size), getattr(parent, entry.size)
            if entry.kind is None or not entry.own:
                sizes[name] = chosen
                if not 0 < chosen <= full:
                    problems.append(f"{name} = {chosen} is not within 1..{full}")
            elif len(chosen) != len(full):
                problems.append(f"{name} has {len(chosen)} widths, the parent has {len(full)} {entry.kind.name} layers")
            else:
                layers = zip(parent.pattern.layers_of(entry.kind), chosen, strict=True)
                sizes[name] = tuple(width for layer_index, width in layers if layer_index in self.kept_layers)
                if any(not 0 < width <= limit for width, limit in zip(chosen, full, strict=True)):
                    problems.append(f"{name} = {chosen} is not within the parent's {full}")
        kept, count = self.kept_layers, len(parent.pattern)
        if not kept or kept != tuple(sorted(set(kept))) or kept[-1] >= count or kept[0] < 0:
            problems.append(f"kept_layers = {kept} must be ascending, not empty and below {count}")
        if problems:
            raise SubnetError("subnet: " + "; ".join(problems))
        return replace(parent, pattern=parent.pattern.select(kept), **sizes)

    def width(self, parent: ModelShape, layer_index: int) -> int:
        """Return the inner width chosen for one parent layer: Mamba heads, FFN neurons or query heads."""
        return self.layer_widths(parent, layer_index)[INNER_AXIS[parent.pattern.kinds[layer_index]]]

    def layer_widths(self, parent: ModelShape, layer_index: int | None) -> dict[Axis, int]:
        """Return the width chosen along every axis that one parent layer has; None: outside the layers."""
        return layer_widths(self, parent.pattern, layer_index)

    def axis_widths(self, axis: Axis) -> tuple[int, ...]:
        """Return what is chosen on one axis: one width, one per layer of its kind, or the number of kept layers."""
        if axis is Axis.DEPTH:
            return (len(self.kept_layers),)
        chosen = getattr(self, AXES[axis].size)
        return tuple(chosen) if AXES[axis].own else (chosen,)
