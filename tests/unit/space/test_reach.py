"""The search for a sample subnet keeps its rule, against brute force over spaces small enough for it."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from elastic.space.axes import Axis
from elastic.space.cost import COUNTED, Budget, Cost, Deployment, Metric, subnet_cost
from elastic.space.reach import even_cuts, sample_subnet, smallest_subnet
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import AxisChoices, Space
from tests.shapes import random_choice

PARENT = ModelShape.uniform(
    "M-M*-M-M*-M-", vocab=512, hidden=128, ffn=512, mamba_heads=16, head_channels=16, mamba_groups=4,
    mamba_state=16, conv_kernel=4, attention_heads=8, kv_heads=2, attention_channels=16,
)  # fmt: skip
AXES = {
    Axis.HIDDEN: AxisChoices((128, 120, 112, 104, 96, 88, 80)),
    Axis.FFN: AxisChoices((512, 384, 320, 256, 128), per_layer=True),
    Axis.MAMBA_HEAD: AxisChoices((16, 12, 8)),
    Axis.ATTENTION_HEAD: AxisChoices((8, 6, 4)),
    Axis.DEPTH: AxisChoices((12, 10, 9)),
}
RANKING = (3, 0, 11, 5, 7, 2, 8, 1, 4, 10, 6, 9)
SPACE = Space(PARENT, AXES, depth_ranking=RANKING)
DEPLOYMENT = Deployment(batch=2, length_tokens=512)


def budget(share: float, metric: Metric = Metric.PARAMS) -> Budget:
    return Budget("asked", metric, ratio=share).absolute(PARENT, DEPLOYMENT)


@cache
def homogeneous() -> list[tuple[Subnet, Cost, float]]:
    """List every subnet of one width per axis, its cost, and how unevenly its axes give way."""
    axes = SPACE.elastic_axes()
    found = []
    for indices in product(*(range(len(SPACE.axes[axis].choices)) for axis in axes)):
        chosen = {axis: (index,) * SPACE.num_slots(axis) for axis, index in zip(axes, indices, strict=True)}
        shares = []
        for axis, index in zip(axes, indices, strict=True):
            choices = SPACE.axes[axis].choices
            shares.append((choices[0] - choices[index]) / (choices[0] - choices[-1]))
        mean = sum(shares) / len(shares)
        subnet, spread = SPACE.subnet(chosen), sum((share - mean) ** 2 for share in shares) / len(shares)
        found.append((subnet, subnet_cost(PARENT, subnet, DEPLOYMENT), spread))
    return found


@pytest.mark.parametrize("metric", COUNTED)
def test_smallest_subnet_and_parent_are_the_extremes_in_every_metric(metric: Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    low = subnet_cost(PARENT, smallest_subnet(SPACE), DEPLOYMENT)[metric]
    high = subnet_cost(PARENT, Subnet.full(PARENT), DEPLOYMENT)[metric]
    for _ in range(50):
        subnet = SPACE.subnet(random_choice(SPACE, generator))
        assert low < subnet_cost(PARENT, subnet, DEPLOYMENT)[metric] <= high
    assert smallest_subnet(SPACE).hidden == 80 and set(smallest_subnet(SPACE).ffn) == {128}
    assert smallest_subnet(SPACE).kept_layers == tuple(sorted(RANKING[:9]))


@pytest.mark.parametrize("metric", COUNTED)
@pytest.mark.parametrize("share", [1.0, 0.8, 0.6])
def test_sample_is_the_most_balanced_of_those_within_tolerance(metric: Metric, share: float) -> None:
    asked = budget(share, metric)
    sample = sample_subnet(SPACE, asked, DEPLOYMENT)
    used = subnet_cost(PARENT, sample.subnet, DEPLOYMENT)
    assert sample.cost == used and sample.ratio == float(used[metric]) / asked.limit and sample.is_near
    every = homogeneous()
    near = [spread for _, used, spread in every if abs(float(used[metric]) / asked.limit - 1) <= asked.tolerance]
    best = min(near)
    (own,) = [spread for subnet, _, spread in every if subnet == sample.subnet]
    assert own == pytest.approx(best, abs=1e-12)
    assert len(near) > 1 or share == 1.0
    assert sample_subnet(SPACE, asked, DEPLOYMENT) == sample


def test_even_cuts_are_those_within_tolerance_and_of_more_every_so_many_th_by_balance() -> None:
    asked = budget(0.7)
    near = [(spread, subnet) for subnet, used, spread in homogeneous() if abs(used.params / asked.limit - 1) <= 0.01]
    cuts = [SPACE.subnet(cut) for cut in even_cuts(SPACE, asked, DEPLOYMENT, 10_000)]
    assert len(cuts) == len(near) > 7 and {cut for _, cut in near} == set(cuts)
    balance = {cut: spread for spread, cut in near}
    assert [balance[cut] for cut in cuts] == pytest.approx(sorted(spread for spread, _ in near), abs=1e-12)
    few = [SPACE.subnet(cut) for cut in even_cuts(SPACE, asked, DEPLOYMENT, 4)]
    assert len(few) == 4 and few == [cuts[number * len(cuts) // 4] for number in range(4)]
    assert even_cuts(SPACE, replace(asked, tolerance=1e-9), DEPLOYMENT, 7) == []


def test_layers_of_a_per_layer_axis_are_mixed_where_the_grid_is_too_coarse() -> None:
    """Two FFN widths in five layers: brute force over all 32 mixtures finds nothing nearer, and only layers that run
    are narrowed."""
    for share in (0.85, 0.9, 0.95):
        space = Space(PARENT, {Axis.FFN: AxisChoices((512, 128), per_layer=True)})
        sample = sample_subnet(space, budget(share), DEPLOYMENT)
        ratios = [
            float(subnet_cost(PARENT, space.subnet({Axis.FFN: mix}), DEPLOYMENT).params) / budget(share).limit
            for mix in product((0, 1), repeat=5)
        ]
        assert abs(sample.ratio - 1) == min(abs(ratio - 1) for ratio in ratios)
        assert set(sample.subnet.ffn) == {512, 128}
    depth = {Axis.DEPTH: AxisChoices((12, 6)), Axis.FFN: AxisChoices((512, 128), per_layer=True)}
    space = Space(PARENT, depth, depth_ranking=(1, 4, 6, 0, 2, 3, 5, 7, 8, 9, 10, 11))
    smallest = subnet_cost(PARENT, space.subnet({Axis.DEPTH: (1,)}), DEPLOYMENT).params
    sample = sample_subnet(space, Budget("asked", Metric.PARAMS, 0.9 * smallest), DEPLOYMENT)
    running = {ordinal for ordinal, layer in enumerate((1, 4, 6, 9, 11)) if layer in (1, 4, 6)}
    assert {n for n, width in enumerate(sample.subnet.ffn) if width == 128} < running


def test_target_between_two_far_choices_is_reported_as_not_met() -> None:
    space = Space(PARENT, {Axis.HIDDEN: AxisChoices((128, 64))})
    sample = sample_subnet(space, budget(0.9), DEPLOYMENT)
    assert not sample.is_near and sample.subnet == Subnet.full(PARENT) and sample.ratio == pytest.approx(1 / 0.9)
    beyond = sample_subnet(SPACE, budget(0.05), DEPLOYMENT)
    assert not beyond.is_near and beyond.subnet == smallest_subnet(SPACE)


def test_space_without_elastic_axes_has_one_subnet() -> None:
    sample = sample_subnet(Space(PARENT, {}), budget(1.0), DEPLOYMENT)
    assert sample.subnet == Subnet.full(PARENT) and sample.ratio == 1.0


def test_parent_whose_layers_differ_is_searched_over_its_own_widths() -> None:
    parent = replace(PARENT, ffn=(512, 256, 512, 256, 128))
    space = Space(parent, {Axis.HIDDEN: AxisChoices((128, 112, 96))})
    for width in (128, 112, 96):
        target = subnet_cost(parent, replace(Subnet.full(parent), hidden=width)).params
        assert sample_subnet(space, Budget("asked", Metric.PARAMS, target), Deployment()).subnet.hidden == width
