"""A search without a model: what is proposed, priced, allowed and picked, and what scores say beside each other."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from elastic.config.verbs import SearchConfig
from elastic.router.decide import likeliest
from elastic.router.router import Router
from elastic.search.candidates import Candidates, joined, likelihood, pick, propose, running, split
from elastic.search.constraint import ConstraintError, met, reach_problems, read_constraint
from elastic.search.front import GIVEN, TRAINED, Scored, above_line, pareto_front
from elastic.space.axes import Axis
from elastic.space.cost import Cost, Metric, subnet_cost
from elastic.space.reach import choice_indices, sample_subnet, smallest_subnet
from elastic.space.shape import Subnet
from elastic.space.space import AxisChoices, Space
from elastic.verbs.search import search_metric
from tests.unit.space.test_reach import DEPLOYMENT, PARENT, SPACE, budget

TRAINED_SUBNETS = {
    name: sample_subnet(SPACE, budget(share), DEPLOYMENT).subnet for name, share in (("a", 0.8), ("b", 0.5))
}
TRAINED_SUBNETS["full"] = Subnet.full(PARENT)


def logits_of(names: list[str], space: Space = SPACE) -> dict[str, dict[Axis, torch.Tensor]]:
    values = Router(space, len(names), seed=3)()
    return {name: {axis: 8 * own[index].detach() for axis, own in values.items()} for index, name in enumerate(names)}


LOGITS = logits_of(list(TRAINED_SUBNETS))


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    return propose(SPACE, TRAINED_SUBNETS, LOGITS, 400, seed=1)


def test_proposals_are_distinct_untrained_and_follow_from_the_seed(candidates: Candidates) -> None:
    again = propose(SPACE, TRAINED_SUBNETS, LOGITS, 400, seed=1)
    assert torch.equal(candidates.indices, again.indices) and candidates.origins == again.origins
    assert not torch.equal(candidates.indices, propose(SPACE, TRAINED_SUBNETS, LOGITS, 400, seed=2).indices)
    shapes = {candidates.subnet(row).shape(PARENT): candidates.subnet(row).kept_layers for row in range(400)}
    assert len(set(shapes.items())) == len(candidates) == 400
    assert not {(subnet.shape(PARENT), subnet.kept_layers) for subnet in TRAINED_SUBNETS.values()} & set(shapes.items())
    counts = [candidates.origins.count(kind) for kind in ("mix", "between", "router", "drop")]
    assert sum(counts) == 400 and min(counts) > 40


def test_each_kind_of_proposal_is_what_it_says(candidates: Candidates) -> None:
    ends = torch.stack([joined(SPACE, subnet) for subnet in TRAINED_SUBNETS.values()])
    low, high = ends.amin(0), ends.amax(0)
    depth = slice(-1, None)  # the last slot
    assert list(split(SPACE, ends))[-1] is Axis.DEPTH
    for row, origin in zip(candidates.indices, candidates.origins, strict=True):
        if origin == "mix":  # every slot is one of the same two budgets'
            assert any(bool(((row == first) | (row == second)).all()) for first in ends for second in ends)
        elif origin == "between":
            assert bool(((row >= low) & (row <= high)).all())
        elif origin == "drop":  # of one budget, another depth, and steps of one choice in one direction
            moved = [(row - end)[:-1] for end in ends if bool((row[depth] != end[depth]).all())]
            assert any(set(steps.tolist()) <= {0, sign} for steps in moved for sign in (-1, 1))


def test_all_at_once_cost_what_each_costs_alone(candidates: Candidates) -> None:
    at_once, rows = candidates.cost(DEPLOYMENT), range(0, 400, 20)
    alone = [subnet_cost(PARENT, candidates.subnet(row), DEPLOYMENT) for row in rows]
    for metric in Metric:
        if getattr(alone[0], metric.value) is not None:  # without a table no time is known
            used = torch.as_tensor(at_once[metric]).expand(400).tolist()
            assert used[::20] == [one[metric] for one in alone]


def test_subnets_of_the_users_own_are_not_proposed_again(candidates: Candidates) -> None:
    others = [candidates.subnet(0), candidates.subnet(7)]
    found = propose(SPACE, TRAINED_SUBNETS, LOGITS, 400, seed=1, others=others)
    proposed = {(one.kept_layers, one.shape(PARENT)) for one in map(found.subnet, range(len(found)))}
    assert len(found) == 400 and not proposed & {(one.kept_layers, one.shape(PARENT)) for one in others}


@pytest.mark.parametrize("axes", [{Axis.HIDDEN: AxisChoices((128, 96))}, {Axis.DEPTH: AxisChoices((12, 11, 9))}])
def test_a_small_space_gives_all_it_has(axes: dict[Axis, AxisChoices]) -> None:
    space = replace(SPACE, axes=axes)
    trained = {"full": Subnet.full(PARENT)}
    found = propose(space, trained, logits_of(["full"], space), 50, seed=0)
    assert len(found) == max(len(own.choices) for own in axes.values()) - 1
    assert all(found.subnet(row) != trained["full"] for row in range(len(found)))


def test_the_likeliest_is_what_the_router_chooses(candidates: Candidates) -> None:
    router = Router(SPACE, 2, seed=5)
    values = router()
    pairs = [(1000.0, {axis: own[0].detach() for axis, own in values.items()}),
             (2000.0, {axis: own[1].detach() for axis, own in values.items()})]  # fmt: skip
    chosen = torch.stack([joined(SPACE, likeliest(router, SPACE, index)) for index in (0, 1)])
    both = Candidates(SPACE, torch.cat([chosen, candidates.indices[:50]]), ("x",) * 52)
    for index, (cost, logits) in enumerate(pairs):
        likely = likelihood(both, torch.full((52,), cost, dtype=torch.float64), pairs)
        assert int(likely.argmax()) == index
        weights = running(SPACE, chosen[index : index + 1])[0]
        best = torch.cat([torch.log_softmax(own.double(), -1).amax(-1) for own in logits.values()])
        assert float(likely[index]) == pytest.approx(float((best * weights).sum() / weights.sum()))
    halfway = likelihood(both, torch.full((52,), 1500.0, dtype=torch.float64), pairs)
    mixed = {axis: (own + pairs[1][1][axis]) / 2 for axis, own in pairs[0][1].items()}
    alone = likelihood(both, torch.full((52,), 7.0, dtype=torch.float64), [(1500.0, mixed)])
    torch.testing.assert_close(halfway, alone)


def test_the_likeliest_of_each_band_of_cost_is_picked_and_empty_bands_are_filled_up() -> None:
    used = torch.tensor([0.0, 1.0, 2.0, 9.0, 9.5, 10.0])
    likely = torch.tensor([-3.0, -1.0, -2.0, -5.0, -4.0, -6.0])
    everything = torch.ones(6, dtype=torch.bool)
    assert pick(used, likely, everything, 2) == [1, 4]
    assert pick(used, likely, everything, 3) == [1, 2, 4]  # nothing lies in the middle
    assert pick(used, likely, torch.tensor([True, False, False, True, False, True]), 2) == [0, 3]
    assert pick(used, likely, everything, 100) == [0, 1, 2, 3, 4, 5]
    assert pick(torch.ones(6), likely, everything, 2) == [1, 2] and pick(used, likely, ~everything, 2) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("params<7e5", "params<7e5 is no limit; write METRIC<=NUMBER or METRIC>=NUMBER"),
        ("params<=1e9,,", "nothing is no limit"),
        ("parms<=1e9", "parms is none of the metrics params, .*; nearest legal name is params"),
        ("params<=-1", "-1 is not a number above 0; write params<=NUMBER"),
        ("params<=7b", "7b is not a number above 0"),
        ("params<=nan", "nan is not a number above 0"),
        ("params<=2e5,params<=3e5", "params<= stands 2 times; give it once"),
    ],
)
def test_a_constraint_that_cannot_be_read_is_named(text: str, line: str) -> None:
    with pytest.raises(ConstraintError, match=rf"constraint = .*: {line}"):
        read_constraint(text)


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        (None, Metric.PARAMS),
        ("flops_per_token<=1e6,params<=2e6", Metric.FLOPS_PER_TOKEN),
        ("tokens_per_s>=20,params<=2e6", Metric.LATENCY_MS),  # the fastest is the cheapest
    ],
)
def test_sizes_are_compared_by_what_a_cheaper_one_has_less_of(text: str | None, metric: Metric) -> None:
    assert search_metric(SearchConfig(constraint=text)) is metric


def test_what_is_out_of_reach_is_told_the_nearest_possible(candidates: Candidates) -> None:
    low = subnet_cost(PARENT, smallest_subnet(SPACE), DEPLOYMENT)
    assert read_constraint(None) == read_constraint("") == ()
    assert not list(reach_problems("params<=7e5,flops_per_token>=1e5", SPACE, DEPLOYMENT))
    problems = list(reach_problems("params<=7,deploy_bytes>=1e15", SPACE, DEPLOYMENT))
    assert [problem.rule.partition(" ")[0] for problem in problems] == ["params<=7", "deploy_bytes>=1e+15"]
    for problem in problems:  # what it says is possible, is
        nearest = problem.remedy.removeprefix("nearest possible is ")
        assert not list(reach_problems(nearest, SPACE, DEPLOYMENT))
    assert float(problems[0].remedy.partition("<=")[2]) == pytest.approx(low.params, rel=1e-5)
    # Each alone can be met, both together by none: the one that misses by the least is told, and meets what it says.
    costs = candidates.cost(DEPLOYMENT)
    most_flops = float(subnet_cost(PARENT, Subnet.full(PARENT), DEPLOYMENT).flops_per_token)
    text = f"params<={float(low.params) * 1.2:.0f},flops_per_token>={most_flops * 0.95:.0f}"
    with pytest.raises(ConstraintError, match="none of 400 subnets meets all of it") as refused:
        met(text, read_constraint(text), costs, 400)
    nearest = refused.value.problems[0].remedy.removeprefix("nearest possible is ")
    assert int(met(nearest, read_constraint(nearest), costs, 400).sum()) >= 1
    allowed = met(None, read_constraint("params<=7e5,params>=5e5"), costs, 400)
    assert torch.equal(allowed, (costs.params <= 7e5) & (costs.params >= 5e5))  # type: ignore[operator]
    assert bool(met(None, (), costs, 400).all())


def scored(name: str, used: float, score: float, origin: str = "mix") -> Scored:
    return Scored(name, Subnet.full(PARENT), Cost(*(0,) * 7), used, score, origin)


def test_the_front_is_monotone_and_beats_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    members = [scored(f"{n}", *torch.rand(2, generator=generator).mul(20).floor().tolist()) for n in range(60)]
    front = pareto_front(members)
    assert all(one.used < two.used and one.score > two.score for one, two in pairwise(front))
    for one in members:
        assert any(best.used <= one.used and best.score <= one.score for best in front)


def test_the_line_lies_between_the_trained_neighbours_alone() -> None:
    trained = [scored("a", 10.0, 4.0, TRAINED), scored("b", 20.0, 3.0, TRAINED), scored("c", 40.0, 2.0, TRAINED)]
    members = [*trained, scored("given", 15.0, 9.0, GIVEN)]
    assert above_line(scored("x", 15.0, 3.6), members) == pytest.approx(0.1)
    assert above_line(scored("x", 30.0, 2.4), members) == pytest.approx(-0.1)
    assert above_line(scored("x", 20.0, 3.5), members) == pytest.approx(0.5)
    assert above_line(scored("x", 9.0, 3.5), members) is None is above_line(scored("x", 41.0, 2.0), members)
    assert above_line(trained[1], members) == 0.0


def test_what_the_candidates_say_of_a_subnet_is_its_choices() -> None:
    for subnet in TRAINED_SUBNETS.values():
        parts = split(SPACE, joined(SPACE, subnet))
        assert {axis: tuple(part.tolist()) for axis, part in parts.items()} == choice_indices(SPACE, subnet)
    assert re.fullmatch("[01]+", "".join(str(int(value)) for value in running(SPACE, joined(SPACE, subnet)[None])[0]))
