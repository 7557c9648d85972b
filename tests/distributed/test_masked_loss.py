"""The loss under a mask: a mean over all tokens of the global batch that count, whatever the layout.

The reference is one process and plain autograd in fp64: full logits, the definition of KL and cross-entropy, one sum
over the tokens that count, divided by their number. No pipeline schedule, no chunks, no gradient buffers. 16 tokens
count, for Megatron-Core divides by a count in fp32: 1/16 is exact there.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import (
    GLOBAL_BATCH,
    MICRO_BATCH,
    SEQUENCE,
    LayoutCase,
    batch,
    elastic_step,
    merge,
    mixed_gates,
    tiny_space,
)
from tests.distributed.harness import run_distributed
from tests.parity.model_factory import relative_error

BOUND = 1e-11
TEMPERATURE, ENTROPY_WEIGHT = 1.5, 0.3  # of elastic_step
LAYOUTS = [
    LayoutCase("TP1", Layout()),
    LayoutCase("TP2+SP", Layout(tensor=2, sequence=True)),
    LayoutCase("DP2", Layout(), data=2),
    LayoutCase("CP2", Layout(context=2)),
    LayoutCase("PP2", Layout(pipeline=2)),
]


def uneven_masks() -> dict[int, Tensor]:
    """Mask each micro-batch differently; 1 and 3, which are all of the second replica's, count nothing."""
    masks = {g: torch.zeros(MICRO_BATCH, SEQUENCE, dtype=torch.bool) for g in range(GLOBAL_BATCH)}
    masks[0][:, 20:] = True  # 12 tokens
    masks[2][:, 3:7] = True  # 4: a mean of means would be another number
    return masks


def reference_step(masks: dict[int, Tensor]) -> dict[str, Any]:
    """Compute loss and gradients of the global batch from the definition, on one process."""
    join_world(Layout(dtype=torch.float64), torch.device("cpu"))
    space, layout = tiny_space(), Layout(dtype=torch.float64)
    student, teacher = (build_model(space, layout, seed=seed, init_std=0.3).train() for seed in (1, 2))
    total, counted, leaves = torch.zeros((), dtype=torch.float64), 0, {}
    for g in range(GLOBAL_BATCH):
        data, gates = batch(g), mixed_gates(space, g, torch.float64)
        with torch.no_grad():
            taught = teacher(data.tokens, positions=data.positions) @ teacher.head_weight().t()  # [S, B, V]
        logits = student(data.tokens, gates, positions=data.positions) @ student.head_weight(gates).t()
        log_p, log_q = ((z / TEMPERATURE).log_softmax(-1) for z in (taught, logits))
        kl = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        labels = data.labels.t().unsqueeze(-1)
        entropy = -logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
        total = total + (masks[g].t() * (kl + ENTROPY_WEIGHT * entropy)).sum()
        counted, leaves[g] = counted + int(masks[g].sum()), gates.weights
    (total / counted).backward()
    gradients = {name: parameter.grad for name, parameter in named_global_parameters(student)}
    gate_gradients = {
        g: {axis.value: leaf.grad * counted for axis, leaf in weights.items() if leaf.grad is not None}
        for g, weights in leaves.items()
    }
    return {"gradients": gradients, "gate_gradients": gate_gradients, "counted": counted}


def step(case: LayoutCase, masks: dict[int, Tensor]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the step of a layout in fp64 under masks."""
    case = replace(case, layout=replace(case.layout, dtype=torch.float64), counted=masks)
    ranks = run_distributed(elastic_step, case.world_size, case)
    return merge(ranks), ranks


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return run_distributed(reference_step, 1, uneven_masks())[0]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_masked_gradients_equal_the_definition_also_where_a_replica_counts_nothing(case, reference) -> None:
    masks = uneven_masks()
    found, ranks = step(case, masks)
    for g in (1, 3):
        assert found["losses"][g] == (0.0, 0.0)
    counted = [sum(rank["num_tokens"].values()) for rank in ranks if rank["last"] and rank["tp"] == 0]
    assert sum(counted) == reference["counted"] == 16
    assert case.data == 1 or sorted(counted) == [0, 16]
    for name, gradient in reference["gradients"].items():
        expected = torch.zeros_like(found["gradients"][name]) if gradient is None else gradient
        assert relative_error(found["gradients"][name], expected) <= BOUND, name
    for g in (0, 2):
        for axis, gradient in reference["gate_gradients"][g].items():
            assert gradient.abs().max() > 0
            assert relative_error(found["gate_gradients"][g][axis], gradient) <= BOUND, (g, axis)


@pytest.mark.parametrize("case", [LAYOUTS[0], LAYOUTS[2]], ids=lambda case: case.name)
def test_a_step_in_which_nothing_counts_has_no_gradient_and_no_nan(case) -> None:
    found, _ = step(case, {g: torch.zeros(MICRO_BATCH, SEQUENCE, dtype=torch.bool) for g in range(GLOBAL_BATCH)})
    assert set(found["losses"].values()) == {(0.0, 0.0)} and found["grad_norm"] == 0
    assert all(not gradient.any() for gradient in found["gradients"].values())
