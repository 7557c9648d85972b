"""The parent and the calibration batches of the importance tests, in one process."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from elastic.model.model import ElasticModel, build_model
from elastic.world.groups import Layout, world
from tests.shapes import UNEVEN as SHAPE
from tests.unit.rank.importance_parent import SPACE


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with world(Layout()):
        yield


@pytest.fixture
def model(one_process: None) -> ElasticModel:
    """Build a parent whose weights are large enough for the layers to matter, its norms not all ones."""
    parent = build_model(SPACE, Layout(), init_std=0.3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in parent.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
    return parent


@pytest.fixture
def batches() -> list[Tensor]:
    """Draw two batches of two sequences."""
    return [torch.randint(SHAPE.vocab, (2, 20), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
