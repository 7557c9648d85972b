"""The router, its budget loss, and the gates it draws."""

from functools import cache

import pytest
import torch

from elastic.router.budget_loss import budget_loss, choice_entropy, cost_shares
from elastic.router.decide import RouterError, likeliest
from elastic.router.draw import Chooser, RouterSettings
from elastic.router.phases import Curriculum, ElasticPhase
from elastic.router.router import Router
from elastic.space.axes import Axis
from elastic.space.cost import COUNTED, Budget, Deployment, Metric, Widths, shape_cost, subnet_cost
from elastic.space.gates import Execution
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, Space
from tests.shapes import random_choice

DEPLOYMENT = Deployment(length_tokens=1024)


def space():
    shape = ModelShape.uniform(
        "M-M*-M-M*-M-", vocab=1024, hidden=128, ffn=512, mamba_heads=16, head_channels=16, mamba_groups=4,
        mamba_state=16, conv_kernel=4, attention_heads=8, kv_heads=2, attention_channels=16,
    )  # fmt: skip
    choices = {
        Axis.HIDDEN: AxisChoices((128, 112, 96, 80)),
        Axis.FFN: AxisChoices((512, 448, 384, 320, 256, 192, 128), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((16, 12, 8)),
        Axis.MAMBA_CHANNEL: AxisChoices((16, 14, 12)),
        Axis.ATTENTION_HEAD: AxisChoices((8, 6, 4), per_layer=True),
        Axis.DEPTH: AxisChoices((12, 11, 10, 9)),
    }
    return Space(shape, choices, depth_ranking=(0, 2, 5, 7, 10, 1, 8, 3, 4, 6, 11, 9))


def budgets(where, ratios=(1.0, 0.7, 0.45), metric=Metric.PARAMS):
    return tuple(Budget(f"b{ratio}", metric, ratio=ratio).absolute(where.parent, DEPLOYMENT) for ratio in ratios)


def source(mode="soft", where=None, seed=0, draws=None, noise=None):
    where = where or space()
    router = Router(where, 3, hidden_width=32, seed=seed)
    settings = RouterSettings(mode=mode, draws_per_step=draws, noise_draws_per_step=noise)
    return Chooser(router, where, budgets(where), DEPLOYMENT, settings, seed)


@cache
def phase(frozen, execution, temperature):
    """Return the one phase of these settings: a chooser reads the router once in it."""
    return ElasticPhase(
        name="test", sequence_length=32, steps=50, temperature=(temperature, temperature), logit_scale=(1.0, 1.0),
        router_frozen=frozen, execution=execution,
    )  # fmt: skip


def moment(frozen=False, execution=Execution.MASK, step=0, temperature=0.5):
    return Curriculum((phase(frozen, execution, temperature),)).at(step)


@pytest.mark.parametrize("metric", COUNTED)
def test_pitfall_10_the_full_model_at_its_own_budget_costs_nothing(metric):
    where = space()
    full = {
        axis: torch.nn.functional.one_hot(
            torch.zeros(1, where.num_slots(axis), dtype=torch.long), len(c.choices)
        ).float()
        for axis, c in where.axes.items()
        if axis in where.elastic_axes()
    }
    assert budget_loss(where, budgets(where, (1.0,), metric), full, DEPLOYMENT).item() == 0.0


@pytest.mark.parametrize("metric", COUNTED)
def test_pitfall_8_every_elastic_axis_hears_the_budget(metric):
    where = space()
    logits = {axis: values.detach().requires_grad_() for axis, values in Router(where, 1).forward().items()}
    probabilities = {axis: values.softmax(-1) for axis, values in logits.items()}
    budget_loss(where, budgets(where, (0.5,), metric), probabilities, DEPLOYMENT).sum().backward()
    for axis, values in logits.items():
        assert values.grad.abs().amax() > 0, axis


def test_expected_cost_of_a_certain_choice_is_the_subnets_cost():
    where, generator = space(), torch.Generator().manual_seed(0)
    for _ in range(20):
        chosen = random_choice(where, generator)
        sure = {
            axis: torch.nn.functional.one_hot(torch.tensor([chosen[axis]]), len(where.axes[axis].choices)).float()
            for axis in where.elastic_axes()
        }
        wanted = subnet_cost(where.parent, where.subnet(chosen), DEPLOYMENT).params
        loss = budget_loss(where, (Budget("b", Metric.PARAMS, wanted),), sure, DEPLOYMENT)
        assert loss.item() < 1e-6


def test_expected_widths_keep_leading_dimensions():
    where = space()
    probabilities = {
        axis: torch.full(
            (2, 3, where.num_slots(axis), len(where.axes[axis].choices)), 1 / len(where.axes[axis].choices)
        )
        for axis in where.elastic_axes()
    }
    widths = Widths.expected(where, probabilities)
    assert widths.axes[Axis.HIDDEN].shape == (2, 3)
    assert widths.axes[Axis.HIDDEN][0, 0] == pytest.approx(104.0)
    assert len(widths.keep) == 12 and widths.keep[9][0, 0] == pytest.approx(0.25)


def test_soft_gates_are_leaves_that_sum_to_one_and_differ_between_micro_batches():
    draw = source().draw(moment(), 4, 0, 1)
    for gates in draw.gates:
        for axis, leaf in gates.weights.items():
            assert leaf.is_leaf and leaf.requires_grad and leaf.dtype == torch.float32
            torch.testing.assert_close(leaf.sum(-1), torch.ones(leaf.shape[0])), axis
    assert not torch.equal(draw.gates[0].weights[Axis.FFN], draw.gates[1].weights[Axis.FFN])


def test_pitfall_18_straight_through_gates_are_exactly_one_hot_with_the_soft_gradient():
    hard, soft = source("straight_through"), source("soft")
    one, other = hard.draw(moment(), 2, 0, 1), soft.draw(moment(), 2, 0, 1)
    for gates, smooth in zip(one.gates, other.gates, strict=True):
        for axis, leaf in gates.weights.items():
            assert set(leaf.unique().tolist()) <= {0.0, 1.0} and (leaf.sum(-1) == 1).all()
            assert torch.equal(leaf.argmax(-1), smooth.weights[axis].argmax(-1))
    flat = torch.randn(one.flat_gradients().shape)
    one.push(flat)
    other.push(flat)
    for own, reference in zip(hard.router.parameters(), soft.router.parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad)


def test_gradients_pushed_through_gates_equal_one_graph():
    """Leaves cut the graph in two; the chain rule across the cut must give the uncut gradient."""
    cut, whole = source(), source()
    draw = cut.draw(moment(), 3, 0, 1)
    targets = [{axis: torch.randn_like(leaf) for axis, leaf in gates.weights.items()} for gates in draw.gates]
    for gates, target in zip(draw.gates, targets, strict=True):
        sum((leaf * target[axis]).square().sum() for axis, leaf in gates.weights.items()).backward()
    draw.push(draw.flat_gradients())
    uncut = whole.draw(moment(), 3, 0, 1)
    loss = uncut.router_loss
    for graph, target in zip(uncut.sources, targets, strict=True):
        loss = loss + sum((value * target[axis]).square().sum() for axis, value in graph.items())
    loss.backward()
    for own, reference in zip(cut.router.parameters(), whole.router.parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad)


@pytest.mark.parametrize("replicas", [2, 3, 6, 12])
def test_gates_depend_on_the_place_in_the_global_batch_not_on_the_replica_count(replicas):
    """Also where replicas have fewer micro-batches than budgets are drawn, or a number that the draws do not divide."""
    alone = source(draws=4).draw(moment(), 12, 0, 1).gates
    for replica in range(replicas):
        for index, gates in enumerate(source(draws=4).draw(moment(), 12 // replicas, replica, replicas).gates):
            same = alone[index * replicas + replica]
            assert gates.budget == same.budget
            assert all(torch.equal(leaf, same.weights[axis]) for axis, leaf in gates.weights.items())


@pytest.mark.parametrize("micro_batch", [2, 3, 6])
def test_gates_depend_on_the_place_in_the_global_batch_not_on_the_micro_batch(micro_batch):
    """24 sequences, 4 draws of budgets and of noise: a micro-batch may be any divisor of the 6 sequences of one."""
    one, other = (source(draws=4, noise=4).draw(moment(), 24 // size, 0, 1).gates for size in (1, micro_batch))
    for sequence in range(24):
        alone, together = one[sequence], other[sequence // micro_batch]
        assert alone.budget == together.budget
        assert all(torch.equal(leaf, alone.weights[axis]) for axis, leaf in together.weights.items())


SLICES = dict(frozen=True, execution=Execution.SLICE)


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
@pytest.mark.parametrize("draws", [4, 16])
def test_slices_run_from_the_smallest_budget_to_the_largest_over_all_replicas(replicas, draws):
    gates, masks = source(draws=draws), source(draws=draws)
    # 0.7, 0.45, 1.0: the order is that of size, not of the list.
    masks.budgets = gates.budgets = gates.budgets[1:] + gates.budgets[:1]
    ratios = [0.7, 0.45, 1.0]
    seen = set()
    for step in range(8):
        here, plain = moment(step=step, **SLICES), masks.draw(moment(step=step, frozen=True), 16, 0, 1).gates
        numbers = [gates.numbers(here, 16 // replicas, replica, replicas) for replica in range(replicas)]
        drawn = [gates.draw(here, 16 // replicas, replica, replicas).gates for replica in range(replicas)]
        assert sorted(number for own in numbers for number in own) == list(range(16)), "each micro-batch once"
        at_once = [[ratios[own.budget] for own in row] for row in zip(*drawn, strict=True)]
        for own, choices in zip(numbers, drawn, strict=True):
            assert [plain[number].budget for number in own] == [choice.budget for choice in choices]
        assert sorted(ratio for row in at_once for ratio in row) == [ratio for row in at_once for ratio in row]
        assert sum(len(set(row)) > 1 for row in at_once) <= 2, "replicas differ where one budget follows another"
        ends_alike = {gates.draw(here, 16 // replicas, replica, replicas).ends_alike for replica in range(replicas)}
        assert ends_alike == {len(set(at_once[-1])) == 1}
        if 16 // draws % replicas == 0:
            assert all(len(set(row)) == 1 for row in at_once), "replicas that divide a draw's run never wait"
        seen.add(tuple(map(tuple, numbers)))
    assert len(seen) > 1


def test_masks_run_in_the_order_of_the_samples():
    assert source(draws=4).numbers(moment(), 4, 1, 3) == [1, 4, 7, 10]


def test_pitfall_27_decisions_have_no_noise():
    assert source().decide(1) == source().decide(1)
    frozen = source().draw(moment(frozen=True, execution=Execution.SLICE), 3, 0, 1)
    again = source().draw(moment(frozen=True, execution=Execution.SLICE, step=7), 3, 0, 1)
    by_budget = {gates.budget: gates.subnet for gates in again.gates}
    assert all(by_budget[gates.budget] == gates.subnet for gates in frozen.gates)
    assert frozen.gates[0].subnet == source().decide(frozen.gates[0].budget)


def test_frozen_masks_are_the_decision_without_gradient():
    gates = source()
    for micro in gates.draw(moment(frozen=True), 3, 0, 1).gates:
        assert not any(weights.requires_grad for weights in micro.weights.values())
        chosen = {axis: tuple(weights.argmax(-1).tolist()) for axis, weights in micro.weights.items()}
        assert gates.space.subnet(chosen) == gates.decide(micro.budget)


def test_ties_go_to_the_wider_choice():
    where = space()
    router = Router(where, 3, hidden_width=8)
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    assert likeliest(router, where, 2).hidden == 128 and len(likeliest(router, where, 2).kept_layers) == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_with_a_bad_weight_decides_nothing(value):
    """Its argmax would be a subnet like any other."""
    gates = source()
    with torch.no_grad():
        gates.router.networks["ffn"][2].bias[-1] = value
    for ask in (
        lambda: gates.decide(1),
        lambda: gates.draw(moment(frozen=True), 3, 0, 1),
        lambda: gates.draw(moment(frozen=True, execution=Execution.SLICE), 3, 0, 1),
    ):
        with pytest.raises(RouterError, match=r"logits for budget \d .* NaN or Inf on ffn, .* earlier checkpoint"):
            ask()


def test_initial_router_depends_on_the_seed_alone():
    torch.manual_seed(1)
    one = Router(space(), 3, seed=4).state_dict()
    torch.manual_seed(2)
    other = Router(space(), 3, seed=4).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in Router(space(), 3, seed=5).state_dict().items())


def test_cost_shares_follow_the_metric_of_each_budget():
    where = space()
    both = budgets(where, (0.7,)) + budgets(where, (0.7,), Metric.DEPLOY_BYTES)
    shares = cost_shares(where, both, DEPLOYMENT)
    narrow = where.subnet({Axis.HIDDEN: (3,)})
    for index, budget in enumerate(both):
        full = shape_cost(where.parent, DEPLOYMENT)[budget.metric]
        wanted = 1 - subnet_cost(where.parent, narrow, DEPLOYMENT)[budget.metric] / full
        assert shares[Axis.HIDDEN][index].item() == pytest.approx(wanted, rel=1e-6)
    assert set(shares) == set(where.elastic_axes()) and all((share > 0).all() for share in shares.values())


def test_the_entropy_reward_does_not_grow_with_the_number_of_layers():
    """Summed over slots it outweighs the cost that one slot of a 62-layer parent can move, and budgets are missed."""
    few, shares = torch.randn(2, 3, 5), {Axis.FFN: torch.tensor([0.2, 0.3])}
    many = few.repeat(1, 9, 1)
    expected = choice_entropy({Axis.FFN: few}, 2.0, shares)
    assert expected > 0
    torch.testing.assert_close(choice_entropy({Axis.FFN: many}, 2.0, shares), expected)


def test_draws_that_cut_through_a_micro_batch_are_our_own_bug():
    """A person's mistake is named by the rules of the config."""
    for draws in (3, 12, 24):
        assert len(source(draws=draws).draw(moment(), 6, 0, 4).gates) == 6
    for draws in (5, 48):
        with pytest.raises(AssertionError, match="cut through a micro-batch"):
            source(draws=draws).draw(moment(), 6, 0, 4)
