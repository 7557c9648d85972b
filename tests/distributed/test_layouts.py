"""Any two parallel layouts give the same numbers: losses, gradient norm, every parameter's and every gate's gradient.

Mixed budgets are in flight (soft masks, one-hot masks, slices), two of the micro-batches hold isolated documents (whose
numbers are those of each alone: tests/parity/test_documents.py), and activations are recomputed, all or some.
Compared in fp64, where rounding (some 1e-14) is far below what a wrong layout does; in bf16 by one process's own error.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elastic.world.groups import Layout
from tests.distributed.elastic_step import GLOBAL_BATCH, LayoutCase, elastic_step, merge
from tests.distributed.harness import run_distributed
from tests.parity.model_factory import relative_error

BOUND = 1e-11
ONE = LayoutCase("one process", Layout())
ALL = LayoutCase("TP2xPP2+SP", Layout(tensor=2, pipeline=2, sequence=True, recompute="full"))
CASES = [
    LayoutCase("recompute", Layout(recompute="full")),
    LayoutCase("TP2", Layout(tensor=2, recompute="full")),
    LayoutCase("TP2+SP", Layout(tensor=2, sequence=True, recompute="full")),
    LayoutCase("PP2", Layout(pipeline=2, recompute="full")),
    LayoutCase("PP2 without recompute", Layout(pipeline=2)),
    LayoutCase("PP2, selective", Layout(pipeline=2, recompute="selective")),
    LayoutCase("DP2", Layout(recompute="full"), data=2),
    LayoutCase("CP2", Layout(context=2, recompute="full")),
    LayoutCase("TP2xCP2+SP, selective", Layout(tensor=2, context=2, sequence=True, recompute="selective")),
    ALL,
]


def step(case: LayoutCase, dtype: torch.dtype = torch.float64) -> dict:
    """Run a case's step in `dtype` and merge what its ranks found."""
    case = replace(case, layout=replace(case.layout, dtype=dtype))
    return merge(run_distributed(elastic_step, case.world_size, case))


@pytest.fixture(scope="module")
def reference():
    return step(ONE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pitfall_22_23_a_layout_gives_the_numbers_of_one_process(case, reference):
    found = step(case)
    assert found["losses"].keys() == reference["losses"].keys() == set(range(GLOBAL_BATCH))
    for g, pair in reference["losses"].items():
        assert found["losses"][g] == pytest.approx(pair, rel=BOUND), f"loss of micro-batch {g}"
    assert found["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in reference["gradients"].items():
        assert gradient.dtype is torch.float64 and relative_error(found["gradients"][name], gradient) <= BOUND, name
    for g, axes in reference["gate_gradients"].items():
        for axis, gradient in axes.items():
            assert gradient.abs().max() > 0, f"gate {axis} of micro-batch {g} has no gradient to compare"
            error = relative_error(found["gate_gradients"][g][axis], gradient)
            assert error <= BOUND, f"gate {axis} of micro-batch {g}"
    # Megatron-Core sums squares of norms in fp32: every term is positive, so each rounding counts at most once.
    norm = torch.stack([gradient.norm() for gradient in reference["gradients"].values()]).norm()
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=len(reference["gradients"]) * 2**-24)


def test_bf16_at_a_layout_errs_as_on_one_process(reference):
    """Beside what fp64 shows: A_log and D stay in fp32, and have gradient buffers of their own."""
    one, all_ranks = (errors(step(case, torch.bfloat16), reference) for case in (ONE, ALL))
    for what, error in one.items():
        assert 0 < all_ranks[what] <= 4 * error, what


def errors(found: dict, reference: dict) -> dict[str, float]:
    """Compare all gradients of the weights, and all of the gates, as one vector each."""

    def one_vector(run: dict) -> dict[str, Tensor]:
        weights = [run["gradients"][name] for name in reference["gradients"]]
        gates = [run["gate_gradients"][g][axis] for g, axes in reference["gate_gradients"].items() for axis in axes]
        return {"weights": torch.cat([*map(_flat, weights)]), "gates": torch.cat([*map(_flat, gates)])}

    expected = one_vector(reference)
    return {what: relative_error(vector, expected[what]) for what, vector in one_vector(found).items()}


def _flat(gradient: Tensor) -> Tensor:
    return gradient.double().flatten()
