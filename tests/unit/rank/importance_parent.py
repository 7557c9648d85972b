"""The parent and the calibration batches of the importance tests."""

import torch
from torch import Tensor

from elastic.model.model import ElasticModel, build_model
from elastic.space.axes import Axis
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import Layout
from tests.shapes import UNEVEN as SHAPE

SPACE = Space(SHAPE, {Axis.MAMBA_CHANNEL: AxisChoices((6, 4, 2))})


def random_parent() -> ElasticModel:
    """Build a parent whose weights are large enough for the layers to matter, its norms not all ones."""
    parent = build_model(SPACE, Layout(), init_std=0.3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in parent.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
    return parent


def token_batches() -> list[Tensor]:
    """Draw two batches of two sequences."""
    return [torch.randint(SHAPE.vocab, (2, 20), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def top_of(score: Tensor, count: int) -> list[int]:
    """Return the places of the largest scores, the first of equals first."""
    return sorted(range(len(score)), key=lambda index: -float(score[index]))[:count]
