"""Elastic axes, their allowed widths, and the space of subnets they span."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Annotated

import torch

from elastic.space.pattern import LayerKind
from elastic.space.ranges import Count, Required
from elastic.space.shape import WIDTH_FIELD, ModelShape
from elastic.space.subnet import Subnet


class Axis(StrEnum):
    """One elastic dimension."""

    HIDDEN = "hidden"
    FFN = "ffn"
    MAMBA_HEAD = "mamba_head"
    MAMBA_CHANNEL = "mamba_channel"
    ATTENTION_HEAD = "attention_head"
    DEPTH = "depth"


AXIS_OF_KIND = {
    LayerKind.MLP: Axis.FFN,
    LayerKind.MAMBA: Axis.MAMBA_HEAD,
    LayerKind.ATTENTION: Axis.ATTENTION_HEAD,
}
KIND_OF_AXIS = {axis: kind for kind, axis in AXIS_OF_KIND.items()}


class SpaceError(ValueError):
    """Choices that the nested layout or the parent does not allow."""


@dataclass(frozen=True)
class AxisChoices:
    """Allowed widths of one axis, descending, index 0 = full. `per_layer`: one choice for each layer of its kind."""

    choices: Annotated[tuple[Count, ...], Required("the full width first, then smaller ones")] = ()
    per_layer: bool = False


@dataclass(frozen=True)
class Space:
    """Every subnet a router may choose inside one parent.

    An axis that is absent from `axes` stays full. `lanes` deals FFN neurons (docs/design.md 2: rank r sits in lane
    r mod lanes). `depth_ranking` lists all layer indices, best first; depth n keeps the first n of it.
    """

    parent: ModelShape
    axes: Mapping[Axis, AxisChoices]
    lanes: int = 8
    depth_ranking: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.depth_ranking:
            object.__setattr__(self, "depth_ranking", tuple(range(len(self.parent.pattern))))
        complete = {axis: self.axes.get(axis, AxisChoices((self.full_width(axis),))) for axis in Axis}
        object.__setattr__(self, "axes", complete)
        problems = [problem for axis in Axis for problem in self._axis_problems(axis)]
        if any(width % self.lanes for width in self.parent.ffn):
            problems.append(f"ffn widths {sorted(set(self.parent.ffn))} must be multiples of lanes = {self.lanes}")
        if sorted(self.depth_ranking) != list(range(len(self.parent.pattern))):
            problems.append(f"depth_ranking must order all {len(self.parent.pattern)} layers once")
        if problems:
            raise SpaceError("space: " + "; ".join(problems))

    def full_width(self, axis: Axis) -> int:
        """Return the parent's width on `axis` (its widest layer; the number of layers for depth)."""
        widths = {
            Axis.HIDDEN: (self.parent.hidden,),
            Axis.FFN: self.parent.ffn,
            Axis.MAMBA_HEAD: self.parent.mamba_heads,
            Axis.MAMBA_CHANNEL: (self.parent.head_channels,),
            Axis.ATTENTION_HEAD: self.parent.attention_heads,
            Axis.DEPTH: (len(self.parent.pattern),),
        }
        return max(widths[axis], default=0)

    def multiple(self, axis: Axis) -> int:
        """Return the number every choice on `axis` must be a multiple of, from the nested layout."""
        multiples = {
            Axis.FFN: self.lanes,
            Axis.MAMBA_HEAD: self.parent.mamba_groups,
            Axis.ATTENTION_HEAD: self.parent.kv_heads,
        }
        return multiples.get(axis, 1)

    def num_slots(self, axis: Axis) -> int:
        """Return how many choices are made on `axis`: one, or one per layer of its kind."""
        if not self.axes[axis].per_layer:
            return 1
        return len(self.parent.pattern.layers_of(KIND_OF_AXIS[axis]))

    def is_elastic(self, axis: Axis) -> bool:
        """Tell whether there is anything to choose on `axis`."""
        return len(self.axes[axis].choices) > 1

    def elastic_axes(self) -> tuple[Axis, ...]:
        """List the axes with more than one choice, in the fixed order of Axis."""
        return tuple(axis for axis in Axis if self.is_elastic(axis))

    def slot(self, axis: Axis, ordinal: int) -> int:
        """Return the slot on `axis` that decides for the layer at `ordinal` among its kind."""
        return ordinal if self.axes[axis].per_layer else 0

    def kept_layers(self, depth: int) -> tuple[int, ...]:
        """Return the `depth` best-ranked layers in their original order."""
        return tuple(sorted(self.depth_ranking[:depth]))

    def subnet(self, chosen: Mapping[Axis, tuple[int, ...]]) -> Subnet:
        """Turn choice indices, one per slot of each axis, into a Subnet; a missing axis stays full."""

        def widths(axis: Axis) -> tuple[int, ...]:
            indices = chosen.get(axis, (0,) * self.num_slots(axis))
            return tuple(self.axes[axis].choices[index] for index in indices)

        def per_layer(axis: Axis) -> tuple[int, ...]:
            own = getattr(self.parent, WIDTH_FIELD[KIND_OF_AXIS[axis]])
            if not self.is_elastic(axis):
                return own  # the parent's own widths may differ between layers
            chosen_widths = widths(axis)
            return tuple(chosen_widths[self.slot(axis, ordinal)] for ordinal in range(len(own)))

        return Subnet(
            hidden=widths(Axis.HIDDEN)[0],
            ffn=per_layer(Axis.FFN),
            mamba_heads=per_layer(Axis.MAMBA_HEAD),
            head_channels=widths(Axis.MAMBA_CHANNEL)[0],
            attention_heads=per_layer(Axis.ATTENTION_HEAD),
            kept_layers=self.kept_layers(widths(Axis.DEPTH)[0]),
        )

    def random_choice(self, generator: torch.Generator) -> dict[Axis, tuple[int, ...]]:
        """Draw choice indices uniformly on every axis and slot."""
        return {
            axis: tuple(
                torch.randint(len(self.axes[axis].choices), (self.num_slots(axis),), generator=generator).tolist()
            )
            for axis in Axis
        }

    def _axis_problems(self, axis: Axis) -> list[str]:
        choices, full = self.axes[axis].choices, self.full_width(axis)
        problems = []
        if not choices:
            return [f"{axis}: no choices given; list at least the full width {full}"]
        if choices[0] != full:
            problems.append(f"{axis}: the first choice is {choices[0]}, it must be the full width {full}")
        if any(later >= earlier for earlier, later in pairwise(choices)):
            problems.append(f"{axis}: choices {list(choices)} must be strictly descending")
        smallest = 1 if full else 0
        for choice in choices:
            multiple = self.multiple(axis)
            if not smallest <= choice <= full:
                problems.append(f"{axis}: choice {choice} is outside {smallest}..{full}")
            elif choice % multiple:
                nearest = max(multiple, round(choice / multiple) * multiple)
                problems.append(f"{axis}: choice {choice} must be a multiple of {multiple}, nearest legal is {nearest}")
        if self.axes[axis].per_layer and axis not in KIND_OF_AXIS:
            problems.append(f"{axis}: one choice serves all layers, per_layer is not allowed")
        if axis in KIND_OF_AXIS and len(set(getattr(self.parent, WIDTH_FIELD[KIND_OF_AXIS[axis]]))) > 1:
            if len(choices) > 1:
                problems.append(
                    f"{axis}: the parent's own widths differ between layers, so this axis cannot be elastic"
                )
        return problems
