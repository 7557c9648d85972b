"""The cost at expected widths: exact at one-hot probabilities, the true mean otherwise, a gradient for every axis."""

import pytest
import torch
from torch import Tensor

from elastic.space.axes import Axis, LayerKind
from elastic.space.cost import COUNTED, Budget, Deployment, Metric, Widths, cost, shape_cost, subnet_cost
from elastic.space.reach import out_of_reach
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, Space
from tests.shapes import random_choice

SPACE = Space(
    ModelShape.uniform(
        "M-M*-M-", vocab=40, hidden=16, ffn=32, mamba_heads=8, head_channels=6, mamba_groups=2, mamba_state=4,
        conv_kernel=4, attention_heads=6, kv_heads=2, attention_channels=4,
    ),
    {
        Axis.HIDDEN: AxisChoices((16, 12, 7)),
        Axis.FFN: AxisChoices((32, 16, 8), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((8, 4), per_layer=True),
        Axis.MAMBA_CHANNEL: AxisChoices((6, 5)),
        Axis.ATTENTION_HEAD: AxisChoices((6, 2)),
        Axis.DEPTH: AxisChoices((7, 6, 4)),
    },
    depth_ranking=(6, 0, 1, 3, 2, 5, 4),
)  # fmt: skip


def expected_widths(space: Space, probabilities: dict[Axis, Tensor]) -> Widths:
    """Mix widths by probabilities [slots, K], as a router does."""

    def width(axis: Axis, slot: int) -> Tensor:
        return (probabilities[axis][slot] * torch.tensor([float(c) for c in space.axes[axis].choices])).sum()

    def per_layer(axis: Axis, kind: LayerKind) -> tuple[Tensor, ...]:
        return tuple(width(axis, space.slot(axis, n)) for n in range(len(space.parent.pattern.layers_of(kind))))

    depths = [set(space.kept_layers(depth)) for depth in space.axes[Axis.DEPTH].choices]
    keep = tuple(
        (probabilities[Axis.DEPTH][0] * torch.tensor([float(layer in kept) for kept in depths])).sum()
        for layer in range(len(space.parent.pattern))
    )
    axes = {
        Axis.HIDDEN: width(Axis.HIDDEN, 0),
        Axis.FFN: per_layer(Axis.FFN, LayerKind.MLP),
        Axis.MAMBA_HEAD: per_layer(Axis.MAMBA_HEAD, LayerKind.MAMBA),
        Axis.MAMBA_CHANNEL: width(Axis.MAMBA_CHANNEL, 0),
        Axis.ATTENTION_HEAD: per_layer(Axis.ATTENTION_HEAD, LayerKind.ATTENTION),
    }
    return Widths(axes, keep)


def probabilities_of(space: Space, choice: dict[Axis, tuple[int, ...]]) -> dict[Axis, Tensor]:
    return {
        axis: torch.nn.functional.one_hot(torch.tensor(choice[axis]), len(space.axes[axis].choices)).float()
        for axis in Axis
    }


def test_one_hot_expected_widths_cost_what_the_subnet_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        choice = random_choice(SPACE, generator)
        exact = subnet_cost(SPACE.parent, SPACE.subnet(choice))
        expected = cost(SPACE.parent, expected_widths(SPACE, probabilities_of(SPACE, choice)), Deployment())
        for metric in COUNTED:
            value = expected[metric]
            assert isinstance(value, Tensor) and value.dtype is torch.float32
            assert float(value) == pytest.approx(float(exact[metric]), rel=1e-6)


def test_expected_cost_is_the_mean_cost_of_independent_draws() -> None:
    """Every formula is linear in each axis: the cost at expected widths is the expectation, not an approximation."""
    probabilities = {
        axis: torch.softmax(torch.randn(SPACE.num_slots(axis), len(SPACE.axes[axis].choices)), dim=-1) for axis in Axis
    }
    # Two axes are mixed and the rest fixed, so that the mean can be taken over all their combinations.
    fixed = {axis: (0,) * SPACE.num_slots(axis) for axis in Axis}
    for first, second in [
        (Axis.HIDDEN, Axis.DEPTH),
        (Axis.MAMBA_CHANNEL, Axis.HIDDEN),
        (Axis.DEPTH, Axis.MAMBA_CHANNEL),
    ]:
        mixed = probabilities_of(SPACE, fixed) | {axis: probabilities[axis] for axis in (first, second)}
        value = cost(SPACE.parent, expected_widths(SPACE, mixed), Deployment())
        for metric in COUNTED:
            mean = sum(
                float(probabilities[first][0][i] * probabilities[second][0][j])
                * float(subnet_cost(SPACE.parent, SPACE.subnet(fixed | {first: (i,), second: (j,)}))[metric])
                for i in range(len(SPACE.axes[first].choices))
                for j in range(len(SPACE.axes[second].choices))
            )
            assert float(value[metric]) == pytest.approx(mean, rel=1e-5)


def test_pitfall_08_every_axis_and_slot_gets_a_gradient_from_the_cost() -> None:
    leaves = {
        axis: torch.full((SPACE.num_slots(axis), len(SPACE.axes[axis].choices)), 0.3, requires_grad=True)
        for axis in Axis
    }
    for metric in (Metric.PARAMS, Metric.WEIGHT_BYTES, Metric.DEPLOY_BYTES, Metric.FLOPS_PER_TOKEN):
        value = cost(SPACE.parent, expected_widths(SPACE, leaves), Deployment())[metric]
        for axis, gradient in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            assert (gradient.norm(dim=-1) > 0).all(), (metric, axis)


def test_unreachable_budget_names_the_nearest_reachable_target() -> None:
    smallest = SPACE.subnet({axis: (len(SPACE.axes[axis].choices) - 1,) * SPACE.num_slots(axis) for axis in Axis})
    low, high = subnet_cost(SPACE.parent, smallest).params, shape_cost(SPACE.parent).params

    def why(target: float) -> tuple[str, str] | None:
        return out_of_reach(SPACE, Budget("asked", Metric.PARAMS, target), Deployment())

    assert [why(float(target)) for target in (low, high, (low + high) / 2)] == [None] * 3
    range_ = f"params lies outside what the choices can reach, {low:,} to {high:,}"
    assert why(low / 2) == (f"target {low / 2:,.0f} {range_}", f"nearest reachable is {low:,}")
    assert why(high * 2.0) == (f"target {high * 2:,} {range_}", f"nearest reachable is {high:,}")
    # A ratio in the field of the absolute target is far out of reach, and said so.
    assert why(0.7) == (f"target 1 {range_}", f"nearest reachable is {low:,}")
