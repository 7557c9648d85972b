"""The space of the importance tests, and what they compare rankings with."""

from torch import Tensor

from elastic.space.axes import Axis
from elastic.space.space import AxisChoices, Space
from tests.shapes import UNEVEN as SHAPE

SPACE = Space(SHAPE, {Axis.MAMBA_CHANNEL: AxisChoices((6, 4, 2))})


def top_of(score: Tensor, count: int) -> list[int]:
    """Return the places of the largest scores, the first of equals first."""
    return sorted(range(len(score)), key=lambda index: -float(score[index]))[:count]
