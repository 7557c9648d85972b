"""An FP8 teacher computes the same at every layout: scales are those of whole rows and tokens."""

import pytest
import torch
from torch import Tensor

from elastic.model.forward import parallel_hidden
from elastic.model.model import build_model
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import batch, tiny_space
from tests.distributed.harness import run_distributed
from tests.distributed.training import elastic_values, rows, train
from tests.parity.model_factory import relative_error


def hidden_of(layout: Layout) -> Tensor:
    """Run the quantised parent, in fp64 between its products; returns the final hidden states of all tokens."""
    here = join_world(layout, torch.device("cpu"))
    model = build_model(tiny_space(), layout, seed=3, init_std=0.2)
    model.requires_grad_(False)
    model.quantise()
    with torch.no_grad():
        return parallel_hidden(model(batch(0).tokens), layout.sequence, here.groups.tp).clone()


@pytest.mark.parametrize("sequence", [False, True], ids=["TP2", "TP2+SP"])
def test_the_numbers_are_those_of_one_process(sequence: bool) -> None:
    (expected,) = run_distributed(hidden_of, 1, Layout(dtype=torch.float64))
    for found in run_distributed(hidden_of, 2, Layout(tensor=2, sequence=sequence, dtype=torch.float64)):
        assert relative_error(found, expected) <= 1e-11


def test_a_family_learns_from_an_fp8_teacher(start) -> None:
    values = elastic_values(start, "fp8_teacher", distill=dict(teacher_precision="fp8"), trainer=dict(max_steps=1))
    run_distributed(train, 1, values)
    found = [value for name, value in rows(start, "fp8_teacher")[1].items() if name.endswith("/kl")]
    assert found and all(0 < value < 10 for value in found)
