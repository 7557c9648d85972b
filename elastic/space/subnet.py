"""A subnet: one width per axis and layer, and the layers that are kept."""

from dataclasses import dataclass

from elastic.space.pattern import LayerKind
from elastic.space.shape import WIDTH_FIELD, ModelShape


class SubnetError(ValueError):
    """A subnet that does not fit in its parent."""


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
        return cls(
            hidden=parent.hidden,
            ffn=parent.ffn,
            mamba_heads=parent.mamba_heads,
            head_channels=parent.head_channels,
            attention_heads=parent.attention_heads,
            kept_layers=tuple(range(len(parent.pattern))),
        )

    def shape(self, parent: ModelShape) -> ModelShape:
        """Return the shape of the submodel cut from `parent`; raises SubnetError if it does not fit inside."""
        self._check(parent)
        kept: dict[str, tuple[int, ...]] = {}
        for kind, name in WIDTH_FIELD.items():
            layers = parent.pattern.layers_of(kind)
            widths = zip(layers, getattr(self, name), strict=True)
            kept[name] = tuple(width for layer_index, width in widths if layer_index in self.kept_layers)
        return ModelShape(
            pattern=parent.pattern.select(self.kept_layers),
            vocab=parent.vocab,
            hidden=self.hidden,
            head_channels=self.head_channels,
            mamba_groups=parent.mamba_groups,
            mamba_state=parent.mamba_state,
            conv_kernel=parent.conv_kernel,
            kv_heads=parent.kv_heads,
            attention_channels=parent.attention_channels,
            tied_embeddings=parent.tied_embeddings,
            norm_epsilon=parent.norm_epsilon,
            **kept,
        )

    def width(self, parent: ModelShape, layer_index: int) -> int:
        """Return the inner width chosen for one parent layer: Mamba heads, FFN neurons or query heads."""
        name = WIDTH_FIELD[parent.pattern.kinds[layer_index]]
        return getattr(self, name)[parent.pattern.ordinal(layer_index)]

    def _check(self, parent: ModelShape) -> None:
        problems = []
        for name in ("hidden", "head_channels"):
            if not 0 < getattr(self, name) <= getattr(parent, name):
                problems.append(f"{name} = {getattr(self, name)} is not within 1..{getattr(parent, name)}")
        for kind, name in WIDTH_FIELD.items():
            chosen, full = getattr(self, name), getattr(parent, name)
            if len(chosen) != len(full):
                problems.append(f"{name} has {len(chosen)} widths, the parent has {len(full)} {kind.name} layers")
            elif any(not 0 < width <= limit for width, limit in zip(chosen, full, strict=True)):
                problems.append(f"{name} = {chosen} is not within the parent's {full}")
        ascending = tuple(sorted(set(self.kept_layers)))
        if not ascending or self.kept_layers != ascending or ascending[-1] >= len(parent.pattern) or ascending[0] < 0:
            problems.append(
                f"kept_layers = {self.kept_layers} must be ascending, not empty and below {len(parent.pattern)}"
            )
        if problems:
            raise SubnetError("subnet: " + "; ".join(problems))


def heterogeneous_layers(subnet: Subnet, parent: ModelShape, kind: LayerKind) -> tuple[int, ...]:
    """Return the chosen widths of the kept layers of one kind, in layer order."""
    return tuple(subnet.width(parent, index) for index in parent.pattern.layers_of(kind) if index in subnet.kept_layers)
