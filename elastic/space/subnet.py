"""A subnet: one width per axis and layer, and the layers that are kept."""

from dataclasses import dataclass, replace
from typing import Any

from elastic.space.axes import AXES, INNER_AXIS, Axis
from elastic.space.shape import ModelShape, layer_widths


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
        sizes: dict[str, Any] = {entry.size: getattr(parent, entry.size) for entry in AXES.values()}
        return cls(**sizes, kept_layers=tuple(range(len(parent.pattern))))

    def shape(self, parent: ModelShape) -> ModelShape:
        """Return the shape of the submodel cut from `parent`; raises SubnetError if it does not fit inside."""
        self._check(parent)
        sizes: dict[str, Any] = {}
        for entry in AXES.values():
            chosen = getattr(self, entry.size)
            if entry.own and entry.kind is not None:
                layers = zip(parent.pattern.layers_of(entry.kind), chosen, strict=True)
                chosen = tuple(width for layer_index, width in layers if layer_index in self.kept_layers)
            sizes[entry.size] = chosen
        return replace(parent, pattern=parent.pattern.select(self.kept_layers), **sizes)

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

    def _check(self, parent: ModelShape) -> None:
        problems = []
        for entry in AXES.values():
            chosen, full, name = getattr(self, entry.size), getattr(parent, entry.size), entry.size
            if not entry.own and not 0 < chosen <= full:
                problems.append(f"{name} = {chosen} is not within 1..{full}")
            elif entry.own and entry.kind is not None and len(chosen) != len(full):
                problems.append(f"{name} has {len(chosen)} widths, the parent has {len(full)} {entry.kind.name} layers")
            elif entry.own and any(not 0 < width <= limit for width, limit in zip(chosen, full, strict=True)):
                problems.append(f"{name} = {chosen} is not within the parent's {full}")
        ascending = tuple(sorted(set(self.kept_layers)))
        if not ascending or self.kept_layers != ascending or ascending[-1] >= len(parent.pattern) or ascending[0] < 0:
            problems.append(
                f"kept_layers = {self.kept_layers} must be ascending, not empty and below {len(parent.pattern)}"
            )
        if problems:
            raise SubnetError("subnet: " + "; ".join(problems))
