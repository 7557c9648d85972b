"""Any two parallel layouts give the same numbers: losses, gradient norm, every parameter's and every gate's gradient.

Mixed budgets are in flight (soft masks, one-hot masks, slices) and activations are fully recomputed.
"""

import pytest
import torch

from elastic.model.model import Layout
from tests.distributed.elastic_step import GLOBAL_BATCH, LayoutCase, elastic_step, merge
from tests.distributed.harness import run_distributed

ONE = LayoutCase("one process", Layout())
CASES = [
    LayoutCase("recompute", Layout(recompute=True)),
    LayoutCase("TP2", Layout(tensor=2, recompute=True)),
    LayoutCase("TP2+SP", Layout(tensor=2, sequence=True, recompute=True)),
    LayoutCase("PP2", Layout(pipeline=2, recompute=True)),
    LayoutCase("PP2 without recompute", Layout(pipeline=2)),
    LayoutCase("DP2", Layout(recompute=True), data=2),
    LayoutCase("CP2", Layout(context=2, recompute=True)),
    LayoutCase("TP2xPP2+SP", Layout(tensor=2, pipeline=2, sequence=True, recompute=True)),
]


@pytest.fixture(scope="module")
def reference():
    return merge(run_distributed(elastic_step, 1, ONE))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-8))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pitfall_22_23_a_layout_gives_the_numbers_of_one_process(case, reference):
    found = merge(run_distributed(elastic_step, case.world_size, case))
    assert found["losses"].keys() == reference["losses"].keys() == set(range(GLOBAL_BATCH))
    for g, pair in reference["losses"].items():
        assert found["losses"][g] == pytest.approx(pair, rel=1e-5), f"loss of micro-batch {g}"
    assert found["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    assert found["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in reference["gradients"].items():
        assert relative(found["gradients"][name], gradient) <= 1e-5, name
    for g, axes in reference["gate_gradients"].items():
        for axis, gradient in axes.items():
            assert gradient.abs().max() > 0, f"gate {axis} of micro-batch {g} has no gradient to compare"
            assert relative(found["gate_gradients"][g][axis], gradient) <= 1e-5, f"gate {axis} of micro-batch {g}"
