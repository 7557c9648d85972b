"""Gates: how one micro-batch's choice reaches the layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from elastic.space.axes import Axis
from elastic.space.shape import Subnet


class Execution(StrEnum):
    """How a choice is carried out (docs/design.md 4)."""

    MASK = "mask"
    SLICE = "slice"


@dataclass(frozen=True)
class Gates:
    """An immutable choice that belongs to one micro-batch.

    MASK: `weights[axis]` is an fp32 leaf [slots, K] over the choices, one-hot or soft; an absent axis is full.
    SLICE: `subnet` holds the widths and `weights` is empty.
    `budget` is the index of the budget that was drawn, for logging; None for a subnet given by hand.
    """

    execution: Execution
    subnet: Subnet | None = None
    weights: Mapping[Axis, Tensor] = field(default_factory=dict)
    budget: int | None = None

    @classmethod
    def slice(cls, subnet: Subnet, budget: int | None = None) -> "Gates":
        """Run `subnet` by computing only its prefixes."""
        return cls(Execution.SLICE, subnet=subnet, budget=budget)

    @classmethod
    def mask(cls, weights: Mapping[Axis, Tensor], budget: int | None = None) -> "Gates":
        """Run the full-size model, multiplied by the masks that `weights` mix."""
        return cls(Execution.MASK, weights=weights, budget=budget)
