"""A router that trains ends at its budgets, and spends them where the task wants it."""

from dataclasses import replace

import pytest
import torch

from elastic.router.decide import likeliest
from elastic.router.phases import Curriculum, ElasticPhase, LearningRate
from elastic.space.axes import Axis
from elastic.space.cost import shape_cost, subnet_cost
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, Space
from tests.unit.router.test_router import source, space


def _anneal(seed, task, steps=150, weight=3.0, where=None):
    """Train a router on the budget loss and, optionally, a made-up task loss that prefers later layers."""
    gates = source(where=where, seed=seed)
    gates.settings = replace(gates.settings, budget_loss_weight=weight)
    router_lr = LearningRate(1e-2, warmup_steps=10)
    phase = ElasticPhase(name="anneal", sequence_length=32, global_batch=12, steps=steps, router_lr=router_lr)
    optimizer = torch.optim.AdamW(gates.router.parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98))
    curriculum = Curriculum((phase,))
    for step in range(steps):
        here = curriculum.at(step)
        draw = gates.draw(here, 3, 0, 1)
        if task:
            for micro in draw.gates:
                sum(_task(gates.space, axis, leaf) for axis, leaf in micro.weights.items()).mul(task / 3).backward()
        optimizer.zero_grad()
        draw.push(draw.flat_gradients())
        for group in optimizer.param_groups:
            group["lr"] = here.router_learning_rate
        optimizer.step()
    chosen = [likeliest(gates.router, gates.space, index) for index in range(3)]
    used = [subnet_cost(gates.space.parent, subnet).params for subnet in chosen]
    return chosen, [cost / budget.limit for cost, budget in zip(used, gates.budgets, strict=True)]


def _task(where, axis, leaf):
    share = (leaf * torch.tensor(where.axes[axis].choices).float()).sum(-1) / where.full_width(axis)
    importance = torch.linspace(0.2, 1.8, len(share)) / len(share) if len(share) > 1 else torch.ones(1)
    return (importance * (1 - share) ** 2).sum()


@pytest.mark.parametrize("seed", range(2))
def test_the_router_meets_its_budgets_by_its_own_choice(seed):
    _, ratios = _anneal(seed, task=0.0)
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios), ratios


def test_the_router_spends_a_budget_where_the_task_wants_it():
    chosen, ratios = _anneal(1, task=0.5, steps=100)
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios), ratios
    ffn = chosen[2].ffn
    assert len(set(ffn)) > 1 and sum(ffn[-2:]) > sum(ffn[:2]), ffn
    full = shape_cost(space().parent).params
    assert subnet_cost(space().parent, chosen[0]).params == full


def test_budgets_are_met_with_many_slots():
    """28 FFN layers, as in the 12B parent: each alone moves the cost by less than 1%."""
    shape = ModelShape.uniform(
        "M-M-M-M*" * 7 + "M-" * 7, vocab=1024, hidden=128, ffn=512, mamba_heads=16, head_channels=16, mamba_groups=4,
        mamba_state=16, conv_kernel=4, attention_heads=8, kv_heads=2, attention_channels=16,
    )  # fmt: skip
    choices = {
        Axis.HIDDEN: AxisChoices((128, 120, 112, 104, 96, 88, 80)),
        Axis.FFN: AxisChoices((512, 448, 384, 320, 256, 192, 128), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((16, 12, 8)),
    }
    _, ratios = _anneal(0, task=0.5, steps=100, where=Space(shape, choices))
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios), ratios
