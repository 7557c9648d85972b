"""A teacher that learns (eq. 15): its gradients are those of the formula at any layout, and a run resumes exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from elastic.config.sections import DistillConfig
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import (
    GLOBAL_BATCH,
    SEQUENCE,
    LayoutCase,
    batch,
    elastic_step,
    merge,
    mixed_gates,
    tiny_space,
)
from tests.distributed.harness import run_distributed
from tests.distributed.training import CURRICULUM, elastic_values, rows, train
from tests.parity.model_factory import relative_error

LOSS = DistillConfig(
    kl_weight=0.9, cross_entropy_weight=0.3, temperature=1.5, chunk_tokens=11, teacher="trained",
    teacher_cross_entropy_weight=0.7,
)  # fmt: skip
COUNTED = torch.arange(SEQUENCE)[None] % 3 > 0
FP64 = dict(dtype=torch.float64)
CASES = [
    LayoutCase("one process", Layout(**FP64)),
    LayoutCase("TP2+SP", Layout(tensor=2, sequence=True, recompute="full", **FP64)),
    LayoutCase("PP2", Layout(pipeline=2, **FP64)),
]


def by_the_formula(layout: Layout) -> dict[str, Any]:
    """Return what autograd makes of eq. 15 written out: alpha CE(whole) + KL(whole, detached || student), per token."""
    join_world(layout, torch.device("cpu"))
    space, tau = tiny_space(), LOSS.temperature
    model = build_model(space, layout, seed=1, init_std=0.3)
    num_tokens, losses, gates = 0, {}, {}
    for g in range(GLOBAL_BATCH):
        one, gates[g] = batch(g, COUNTED if g == 1 else None), mixed_gates(space, g, torch.float64)
        counts = one.token_weights().bool()[0]

        def logits(chosen: Any) -> torch.Tensor:
            hidden = model(one.tokens, chosen, positions=one.positions)  # noqa: B023  # called in its own round
            return (hidden @ model.head_weight(chosen).T)[:, 0][counts]  # noqa: B023

        labels, whole, student = one.labels[0][counts], logits(None), logits(gates[g])
        teacher = (whole.detach() / tau).log_softmax(-1)
        kl = tau**2 * F.kl_div((student / tau).log_softmax(-1), teacher, reduction="sum", log_target=True)
        of_teacher, of_student = (F.cross_entropy(z, labels, reduction="sum") for z in (whole, student))
        (0.7 * of_teacher + 0.9 * kl + 0.3 * of_student).backward()
        losses[g], num_tokens = (float(kl), float(of_student)), num_tokens + len(labels)
    per_token = (1.0 / torch.tensor(num_tokens)).double()  # in fp32, as Megatron-Core divides
    return {
        "losses": losses,
        "gradients": {name: p.grad * per_token for name, p in named_global_parameters(model)},
        "gate_gradients": {g: {axis.value: leaf.grad for axis, leaf in of.weights.items()} for g, of in gates.items()},
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return run_distributed(by_the_formula, 1, CASES[0].layout)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_teacher_learns_the_text_and_the_students_learn_from_it(case: LayoutCase, expected: dict[str, Any]) -> None:
    found = merge(run_distributed(elastic_step, case.world_size, replace(case, loss=LOSS, counted={1: COUNTED})))
    assert found["losses"].keys() == expected["losses"].keys()
    for g, pair in expected["losses"].items():
        assert found["losses"][g] == pytest.approx(pair, rel=1e-10)
    for name, gradient in expected["gradients"].items():
        assert relative_error(found["gradients"][name], gradient) <= 1e-10, name
    for g, axes in expected["gate_gradients"].items():
        for axis, gradient in axes.items():
            assert relative_error(found["gate_gradients"][g][axis], gradient) <= 1e-10, (g, axis)


def test_a_run_with_a_teacher_that_learns_resumes_exactly_and_its_whole_model_agrees_with_itself(start: Path) -> None:
    """Beside the text the whole model has nothing to learn: it is its own teacher, and its KL is 0."""
    curriculum = [dict(CURRICULUM[0], steps=3), dict(CURRICULUM[1], steps=2)]
    taught = dict(distill=dict(teacher="trained"), init_from=dict(subnets=[dict(name="full")]), curriculum=curriculum)
    for version, stops in (("taught", (None,)), ("taught_in_two", (2, None))):
        for max_steps in stops:
            trainer = dict(max_steps=max_steps, checkpoint_every_n_steps=2)
            run_distributed(train, 1, elastic_values(start, version, trainer=trainer, **taught))
    whole, in_two = rows(start, "taught"), rows(start, "taught_in_two")
    for name in [name for name in in_two[2] if name.startswith("validation/")]:
        del in_two[2][name]  # a run that stops looks once more
    assert whole == in_two and len(whole) == 5
    assert [row["train/full/kl"] for step, row in whole.items() if step > 3 and "train/full/kl" in row] == [0.0, 0.0]
