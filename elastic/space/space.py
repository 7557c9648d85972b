"""Allowed widths of the axes, and the space of subnets they span."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from elastic.space.axes import AXES, LANES, Axis, LayerKind
from elastic.space.ranges import Layers, Required, Size
from elastic.space.shape import ModelShape, Subnet

# How many layers of a kind every depth keeps: the best-ranked ones, or all where the parent has fewer.
KeepAtLeast = Mapping[Literal["mamba", "mlp", "attention"], Layers]


class SpaceError(ValueError):
    """Choices that the nested layout or the parent does not allow."""


@dataclass(frozen=True)
class AxisChoices:
    """Allowed widths of one axis, descending, index 0 = full. `per_layer`: one choice for each layer of its kind."""

    choices: Annotated[tuple[Size, ...], Required("the full width first, then smaller ones")] = ()
    per_layer: bool = False


@dataclass(frozen=True)
class Space:
    """Every subnet a router may choose inside one parent.

    An axis that is absent from `axes` stays full. `lanes` deals FFN neurons (docs/design.md 2: rank r sits in lane
    r mod lanes). `depth_ranking` lists all layer indices, best first; depth n keeps the first n of it, after
    the best of every kind that `keep_at_least` asks for.
    """

    parent: ModelShape
    axes: Mapping[Axis, AxisChoices]
    lanes: int = 8
    depth_ranking: tuple[int, ...] = ()
    keep_at_least: KeepAtLeast = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.depth_ranking:
            object.__setattr__(self, "depth_ranking", tuple(range(len(self.parent.pattern))))
        complete = {axis: self.axes.get(axis, AxisChoices((self.full_width(axis),))) for axis in Axis}
        object.__setattr__(self, "axes", complete)
        problems = [problem for axis in Axis for problem in self._axis_problems(axis)]
        for axis, entry in AXES.items():
            widths = sorted(set(Subnet.full(self.parent).axis_widths(axis)))
            if entry.parts == LANES and any(width % self.lanes for width in widths):
                problems.append(f"{axis} widths {widths} must be multiples of lanes = {self.lanes}")
        shallowest = min(complete[Axis.DEPTH].choices, default=0)
        if sorted(self.depth_ranking) != list(range(len(self.parent.pattern))):
            problems.append(f"depth_ranking must order all {len(self.parent.pattern)} layers once")
        elif (room := len(self._must_stay)) > shallowest > 0:
            problems.append(f"{Axis.DEPTH}: choice {shallowest} is below the {room} layers of keep_at_least")
        if problems:
            raise SpaceError("space: " + "; ".join(problems))

    def full_width(self, axis: Axis) -> int:
        """Return the parent's width on `axis` (its widest layer; the number of layers for depth)."""
        return max(Subnet.full(self.parent).axis_widths(axis), default=0)

    def parts(self, axis: Axis) -> int:
        """Return over how many equal parts a width of `axis` is dealt, which every choice is a multiple of."""
        name = None if axis is Axis.DEPTH else AXES[axis].parts
        if name is None:
            return 1
        return self.lanes if name == LANES else int(getattr(self.parent, name))

    def num_slots(self, axis: Axis) -> int:
        """Return how many choices are made on `axis`: one, or one per layer of its kind."""
        return len(Subnet.full(self.parent).axis_widths(axis)) if self.axes[axis].per_layer else 1

    def elastic_axes(self) -> tuple[Axis, ...]:
        """List the axes with more than one choice, in the fixed order of Axis."""
        return tuple(axis for axis in Axis if len(self.axes[axis].choices) > 1)

    def slot(self, axis: Axis, ordinal: int) -> int:
        """Return the slot on `axis` that decides for the layer at `ordinal` among its kind."""
        return ordinal if self.axes[axis].per_layer else 0

    def kept_layers(self, depth: int) -> tuple[int, ...]:
        """Return the `depth` best layers in their original order; those that must stay count as the best."""
        others = [layer for layer in self.depth_ranking if layer not in self._must_stay]
        return tuple(sorted([*self._must_stay, *others][:depth]))

    @cached_property
    def _must_stay(self) -> tuple[int, ...]:
        """The best-ranked layers of each kind, as many as `keep_at_least` says."""
        kinds = self.parent.pattern.kinds
        ranked = {kind: [layer for layer in self.depth_ranking if kinds[layer] is kind] for kind in LayerKind}
        return tuple(layer for name, n in self.keep_at_least.items() for layer in ranked[LayerKind[name.upper()]][:n])

    def depth_table(self) -> Tensor:
        """Return 0/1 [K, L], fp32: row k is 1 where a layer runs at the k-th depth."""
        kept = [set(self.kept_layers(depth)) for depth in self.axes[Axis.DEPTH].choices]
        return torch.tensor([[float(layer in layers) for layer in range(len(self.parent.pattern))] for layers in kept])

    def widths_table(self, axis: Axis, device: torch.device) -> Tensor:
        """Return what each choice means: widths [K], of depth which layers run [K, L]; fp64, brought to a device once.

        A copy to a GPU waits for it, and the router's loss asks at every step.
        """
        if (axis, device) not in self._tables:
            table = self.depth_table() if axis is Axis.DEPTH else torch.tensor(self.axes[axis].choices)
            self._tables[axis, device] = table.to(device, torch.float64)
        return self._tables[axis, device]

    @cached_property
    def _tables(self) -> dict[tuple[Axis, torch.device], Tensor]:
        return {}

    def subnet(self, chosen: Mapping[Axis, Sequence[int]]) -> Subnet:
        """Turn choice indices, one per slot of each axis, into a Subnet; a missing axis stays full."""
        indices = {axis: chosen.get(axis, (0,) * self.num_slots(axis)) for axis in Axis}
        widths = {axis: [self.axes[axis].choices[index] for index in own] for axis, own in indices.items()}
        sizes: dict[str, Any] = {}
        for axis, entry in AXES.items():
            own = getattr(self.parent, entry.size)
            if axis not in self.elastic_axes():
                sizes[entry.size] = own  # the parent's own widths may differ between layers
            elif entry.own:
                sizes[entry.size] = tuple(widths[axis][self.slot(axis, ordinal)] for ordinal in range(len(own)))
            else:
                sizes[entry.size] = widths[axis][0]
        return Subnet(**sizes, kept_layers=self.kept_layers(widths[Axis.DEPTH][0]))

    def _axis_problems(self, axis: Axis) -> list[str]:
        choices, full = self.axes[axis].choices, self.full_width(axis)
        if not choices:
            return [f"{axis}: no choices given; list at least the full width {full}"]
        problems = []
        if choices[0] != full:
            problems.append(f"{axis}: the first choice is {choices[0]}, it must be the full width {full}")
        if any(later >= earlier for earlier, later in pairwise(choices)):
            problems.append(f"{axis}: choices {list(choices)} must be strictly descending")
        smallest, multiple = 1 if full else 0, self.parts(axis)
        for choice in choices:
            if not smallest <= choice <= full:
                problems.append(f"{axis}: choice {choice} is outside {smallest}..{full}")
            elif choice % multiple:
                nearest = max(multiple, round(choice / multiple) * multiple)
                problems.append(f"{axis}: choice {choice} must be a multiple of {multiple}, nearest legal is {nearest}")
        own = axis is not Axis.DEPTH and AXES[axis].own
        if self.axes[axis].per_layer and not own:
            problems.append(f"{axis}: one choice serves all layers, per_layer is not allowed")
        if own and len(set(Subnet.full(self.parent).axis_widths(axis))) > 1 and len(choices) > 1:
            problems.append(f"{axis}: the parent's own widths differ between layers, so this axis cannot be elastic")
        return problems
