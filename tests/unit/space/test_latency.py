"""Measured times: looked up at grid widths, mixed between, the true mean under probabilities; a budget's metric."""

import itertools
from dataclasses import replace

import pytest
import torch

from elastic.router.budget_loss import budget_loss
from elastic.space.axes import AXES, Axis, LayerKind
from elastic.space.cost import Budget, Deployment, Metric, Widths, cost, subnet_cost
from elastic.space.latency import part_axes, part_of
from elastic.space.reach import out_of_reach, sample_subnet, smallest_subnet
from elastic.space.shape import Subnet
from elastic.space.space import Space
from tests.shapes import random_choice, random_table
from tests.unit.space.test_expected_cost import SPACE, probabilities_of

TABLE = random_table(SPACE, torch.Generator().manual_seed(0))
DECODE, PREFILL = Deployment(latency=TABLE), Deployment(timed="prefill", latency=TABLE)


def looked_up(subnet: Subnet, deployment: Deployment) -> float:
    """Add up a subnet of grid widths, entry by entry."""
    measured, parent = deployment.measured, SPACE.parent
    assert measured is not None
    points = {
        part: list(itertools.product(*(TABLE.widths[axis] for axis in part_axes(part)))) for part in measured.layer_ms
    }
    total = measured.layer_ms["rest"][points["rest"].index((subnet.hidden,))]
    for layer in subnet.kept_layers:
        part, widths = part_of(parent.pattern.kinds[layer]), subnet.layer_widths(parent, layer)
        total += measured.layer_ms[part][points[part].index(tuple(widths[axis] for axis in part_axes(part)))]
    return total


@pytest.mark.parametrize("deployment", [DECODE, PREFILL])
def test_a_subnet_takes_what_its_layers_took(deployment: Deployment) -> None:
    generator, seen = torch.Generator().manual_seed(1), set()
    for _ in range(20):
        choice = random_choice(SPACE, generator)
        subnet = SPACE.subnet(choice)
        used = subnet_cost(SPACE.parent, subnet, deployment)
        assert isinstance(used.latency_ms, float) and used.latency_ms == pytest.approx(looked_up(subnet, deployment))
        tokens = 8192 if deployment is PREFILL else 1
        assert used.tokens_per_s == pytest.approx(1e3 * tokens / used.latency_ms)
        sure = Widths.expected(SPACE, probabilities_of(SPACE, choice))
        expected = cost(SPACE.parent, sure, deployment).latency_ms
        assert isinstance(expected, torch.Tensor) and float(expected) == pytest.approx(used.latency_ms)
        seen.add(used.latency_ms)
    assert len(seen) > 15


def test_a_width_between_two_measured_ones_takes_its_share_of_both() -> None:
    full = Subnet.full(SPACE.parent)
    low, middle, high = (
        subnet_cost(SPACE.parent, replace(full, hidden=width), DECODE).latency_ms for width in (12, 13, 16)
    )
    assert low is not None and high is not None and middle == pytest.approx(0.75 * low + 0.25 * high)
    beside = subnet_cost(SPACE.parent, replace(full, hidden=6), DECODE)
    assert beside.latency_ms is None and beside.tokens_per_s is None and beside.params > 0
    assert subnet_cost(SPACE.parent, full, replace(DECODE, batch=2)).latency_ms is None


def test_expected_time_is_the_mean_over_independent_draws_and_every_slot_hears_it() -> None:
    """Over all subnets of a space of four axes: linear in the probabilities, though in no width."""
    generator = torch.Generator().manual_seed(2)
    mixed = (Axis.HIDDEN, Axis.FFN, Axis.MAMBA_HEAD, Axis.DEPTH)
    fixed = {axis: (0,) * SPACE.num_slots(axis) for axis in Axis}
    chances = probabilities_of(SPACE, fixed)
    for axis in mixed:
        chances[axis] = torch.rand(chances[axis].shape, generator=generator).double().softmax(-1)
    slots = {
        axis: itertools.product(range(len(SPACE.axes[axis].choices)), repeat=SPACE.num_slots(axis)) for axis in mixed
    }
    mean = 0.0
    for point in itertools.product(*slots.values()):
        chosen = dict(zip(slots, point, strict=True))
        chance = 1.0
        for axis, indices in chosen.items():
            for slot, index in enumerate(indices):
                chance *= float(chances[axis][slot, index])
        mean += chance * looked_up(SPACE.subnet(fixed | chosen), DECODE)
    leading = {axis: values.expand(2, 3, *values.shape) for axis, values in chances.items()}  # draws, budgets
    value = cost(SPACE.parent, Widths.expected(SPACE, leading), DECODE).latency_ms
    assert isinstance(value, torch.Tensor) and value.shape == (2, 3)
    torch.testing.assert_close(value, torch.full((2, 3), mean, dtype=torch.float64))
    leaves = {axis: values.clone().requires_grad_() for axis, values in chances.items()}
    alone = cost(SPACE.parent, Widths.expected(SPACE, leaves), DECODE).latency_ms
    assert isinstance(alone, torch.Tensor)
    for axis, gradient in zip(leaves, torch.autograd.grad(alone, list(leaves.values())), strict=True):
        assert (gradient.norm(dim=-1) > 0).all(), axis


def test_a_floor_on_speed_is_a_limit_on_the_time_of_a_pass() -> None:
    eight = replace(
        PREFILL, latency=random_table(SPACE, torch.Generator(), batch=4, length_tokens=100), batch=4, length_tokens=100
    )
    asked = Budget("fast", Metric.TOKENS_PER_S, target=20_000.0).absolute(SPACE.parent, eight)
    assert (asked.metric, asked.limit) == (Metric.LATENCY_MS, 20.0)  # 400 tokens in 20 ms


def test_budgets_in_time_are_sampled_and_trained_like_others() -> None:
    asked = Budget("half", Metric.LATENCY_MS, ratio=0.6).absolute(SPACE.parent, DECODE)
    sample = sample_subnet(SPACE, asked, DECODE)
    assert sample.is_near and sample.cost.latency_ms == pytest.approx(asked.limit, rel=0.01)
    assert out_of_reach(SPACE, asked, DECODE) is None
    rule, remedy = out_of_reach(SPACE, replace(asked, target=0.001), DECODE) or ("", "")
    assert rule.startswith("target 0.001 latency_ms lies outside") and remedy.startswith("nearest reachable is ")
    full = {
        axis: chance[None]
        for axis, chance in probabilities_of(SPACE, {a: (0,) * SPACE.num_slots(a) for a in Axis}).items()
    }
    whole = Budget("full", Metric.LATENCY_MS, ratio=1.0).absolute(SPACE.parent, DECODE)
    assert budget_loss(SPACE, [whole], full, DECODE).item() == pytest.approx(0.0, abs=1e-6)


def test_a_parent_that_was_measured_faster_than_its_smallest_subnet_is_within_reach() -> None:
    """Two models that are almost alike, and the noise of a clock."""
    turned = {part: times[::-1] for part, times in TABLE.measured[0].layer_ms.items()}
    noisy = replace(DECODE, latency=replace(TABLE, measured=(replace(TABLE.measured[0], layer_ms=turned),)))
    alike = Space(SPACE.parent, {Axis.HIDDEN: SPACE.axes[Axis.HIDDEN]})
    whole = Budget("full", Metric.LATENCY_MS, ratio=1.0).absolute(SPACE.parent, noisy)
    assert subnet_cost(SPACE.parent, smallest_subnet(alike), noisy)[Metric.LATENCY_MS] > 1.01 * whole.limit
    assert out_of_reach(alike, whole, noisy) is None
    assert out_of_reach(alike, replace(whole, target=whole.limit / 2), noisy) is not None


def test_a_table_of_another_parent_or_with_holes_says_so() -> None:
    assert list(TABLE.problems(SPACE.parent)) == []
    assert list(TABLE.problems(replace(SPACE.parent, vocab=41))) == ["was measured with vocab = 40, the parent has 41"]
    without = replace(
        TABLE, widths={axis: grid for axis, grid in TABLE.widths.items() if AXES[axis].kind is not LayerKind.MLP}
    )
    assert list(without.problems(SPACE.parent)) == ["has no widths of ffn"]
    odd = replace(TABLE, widths={**TABLE.widths, Axis.HIDDEN: (16, 7)})
    assert "has hidden widths [16, 7], which must ascend" in list(odd.problems(SPACE.parent))
    short = replace(TABLE.measured[0], layer_ms={**TABLE.measured[0].layer_ms, "mlp": (1.0,)})
    (rule,) = replace(TABLE, measured=(short,)).problems(SPACE.parent)
    assert rule == "holds 1 times of mlp for decode of 1 x 8,192 tokens, its widths make 9"
