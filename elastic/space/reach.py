"""What a space can reach: its smallest subnet, and for a budget one subnet that meets it.

C candidates (one choice per axis, the same in every layer), A elastic axes, K choices.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.space.axes import AXES, Axis
from elastic.space.cost import Budget, Cost, Deployment, Widths, cost, in_figures, subnet_cost
from elastic.space.shape import Subnet
from elastic.space.space import AxisChoices, Space, SpaceError

_GOLDEN_RATIO = 0.6180339887498949  # multiples of it, modulo 1, fall evenly
Slots = Mapping[Axis, Sequence[int]]  # choices of every slot of an axis
Step = tuple[Axis, int, int]  # axis, slot, and by how many choices


def smallest_subnet(space: Space) -> Subnet:
    """Return the subnet of all smallest choices, the cheapest in every counted metric; the dearest is the parent."""
    return space.subnet({axis: (len(space.axes[axis].choices) - 1,) * space.num_slots(axis) for axis in Axis})


def out_of_reach(
    space: Space, budget: Budget, deployment: Deployment, *, as_ratio: bool = False
) -> tuple[str, str] | None:
    """Return why a target does not lie between the smallest subnet and the parent (0.1% slack), and what does.

    With `as_ratio` that is also said as the share of the parent that a budget may name instead.
    """
    extremes = (smallest_subnet(space), Subnet.full(space.parent))
    costs = [float(subnet_cost(space.parent, subnet, deployment)[budget.metric]) for subnet in extremes]
    low, high = sorted(costs)  # measured times of two that are almost alike may stand the other way round
    if low * 0.999 <= budget.limit <= high * 1.001:
        return None
    nearest = low if budget.limit < low else high
    least, asked, most, near = (in_figures(budget.metric, value) for value in (low, budget.limit, high, nearest))
    rule = f"target {asked} {budget.metric} lies outside what the choices can reach, {least} to {most}"
    ratio = f", a ratio of {math.ceil(1000 * nearest / costs[1]) / 1000}" if as_ratio else ""
    return rule, f"nearest reachable is {near}{ratio}"


@dataclass(frozen=True)
class Sample:
    """A subnet picked for a budget, its cost, and that cost as a share of the target.

    `is_near`: the target is met within the budget's tolerance; if not, the choices are too coarse around it.
    """

    subnet: Subnet
    cost: Cost
    ratio: float
    is_near: bool


def sample_subnet(space: Space, budget: Budget, deployment: Deployment) -> Sample:
    """Pick a sensible subnet for a budget, the same one every time; the router is free to learn another.

    1. Of the subnets with one width per axis that meet the target within its tolerance, the most balanced: each axis
       gives up about the same share of what its choices let it give up.
    2. If there is none, the most balanced one just above the target, with as many layers of the per-layer axes as it
       takes, evenly spread, one choice narrower.
    3. If that ends no nearer, the nearest subnet of one width per axis, however far.
    """
    axes = space.elastic_axes()
    if not axes:
        return _sample(space, {}, budget, deployment)
    candidates, spread = _combinations(space)
    reached = _even_ratios(space, candidates, budget, deployment)
    distance = (reached - 1.0).abs()

    def best(allowed: Tensor) -> dict[Axis, list[int]]:
        """Return the slots of the most balanced allowed candidate; of equals the nearest, then the first."""
        rows = allowed.nonzero().flatten().tolist()
        chosen = candidates[min(rows, key=lambda row: (float(spread[row]), float(distance[row])))].tolist()
        return {axis: [index] * space.num_slots(axis) for axis, index in zip(axes, chosen, strict=True)}

    near = distance <= budget.tolerance
    if near.any():
        return _sample(space, best(near), budget, deployment)
    options = [_sample(space, best(distance == distance.min()), budget, deployment)]
    # Every per-layer axis one choice narrower, where there is one.
    narrower = candidates + torch.tensor([int(space.axes[axis].per_layer) for axis in axes])
    narrowed = torch.minimum(narrower, torch.tensor([len(space.axes[axis].choices) - 1 for axis in axes]))
    below = _even_ratios(space, narrowed, budget, deployment) <= 1.0
    above = (reached >= 1.0) & below
    if above.any():
        chosen = best(above)
        options += _on_the_way(space, chosen, _narrowing(space, chosen), budget, deployment)
    return min(options, key=lambda sample: abs(sample.ratio - 1.0))


def even_cuts(space: Space, budget: Budget, deployment: Deployment, most: int) -> list[dict[Axis, tuple[int, ...]]]:
    """List choices, one for all layers of an axis, that meet a budget within its tolerance: at most `most`.

    Of more, every so many-th in the order of their balance, from the most balanced to the least.
    """
    axes = space.elastic_axes()
    if not axes:
        return [{}]
    candidates, spread = _combinations(space)
    reached = _even_ratios(space, candidates, budget, deployment)
    rows = ((reached - 1.0).abs() <= budget.tolerance).nonzero().flatten()
    rows = rows[spread[rows].argsort(stable=True)]
    taken = rows[torch.arange(min(most, len(rows))) * len(rows) // max(min(most, len(rows)), 1)]
    return [
        {axis: (index,) * space.num_slots(axis) for axis, index in zip(axes, candidates[row].tolist(), strict=True)}
        for row in taken.tolist()
    ]


def _combinations(space: Space) -> tuple[Tensor, Tensor]:
    """Return the choice indices [C, A] of every combination of one choice per elastic axis, the widest first, and [C]
    how unevenly the axes give way in each: the variance over axes of (full - width) / (full - smallest).

    Shares of the range and not of the full width, because the choices say how much each axis can bear.
    """
    choices = [torch.tensor(space.axes[axis].choices, dtype=torch.float64) for axis in space.elastic_axes()]
    candidates = torch.cartesian_prod(*(torch.arange(len(own)) for own in choices)).reshape(-1, len(choices))
    shares = [((own[0] - own) / (own[0] - own[-1]))[index] for own, index in zip(choices, candidates.T, strict=True)]
    return candidates, torch.stack(shares).var(dim=0, correction=0)


def _even_ratios(space: Space, candidates: Tensor, budget: Budget, deployment: Deployment) -> Tensor:
    """Return cost / target [C] of combinations [C, A] of one choice per elastic axis."""
    chosen = dict(zip(space.elastic_axes(), candidates.T.unsqueeze(-1), strict=True))
    return ratios(homogeneous(space), chosen, budget, deployment)


def ratios(space: Space, chosen: Mapping[Axis, Tensor], budget: Budget, deployment: Deployment) -> Tensor:
    """Return cost / target [C] of candidates, fp64, exact for costs below 2^53; `chosen`: choice indices [C, slots]."""
    probabilities = {
        axis: torch.nn.functional.one_hot(indices, len(space.axes[axis].choices)) for axis, indices in chosen.items()
    }
    used = cost(space.parent, Widths.expected(space, probabilities), deployment)[budget.metric]
    # A metric that no elastic axis touches is a plain number.
    count = len(next(iter(chosen.values())))
    return torch.as_tensor(used, dtype=torch.float64).expand(count) / budget.limit


def homogeneous(space: Space) -> Space:
    """Return the space with one choice per axis, which serves all layers."""
    return replace(space, axes={axis: AxisChoices(own.choices) for axis, own in space.axes.items()})


def _narrowing(space: Space, chosen: Slots) -> Iterator[Step]:
    """Narrow the per-layer axes by one choice, layer after layer of those that run."""
    kept, kinds = space.subnet(chosen).kept_layers, space.parent.pattern.kinds
    for axis, slots in chosen.items():
        if space.axes[axis].per_layer and slots[0] + 1 < len(space.axes[axis].choices):
            layers = [layer_index for layer_index, kind in enumerate(kinds) if kind is AXES[axis].kind]
            running = [ordinal for ordinal, layer_index in enumerate(layers) if layer_index in kept]
            spread = sorted((number * _GOLDEN_RATIO % 1.0, ordinal) for number, ordinal in enumerate(running))
            yield from ((axis, ordinal, 1) for _, ordinal in spread)


def _on_the_way(
    space: Space, start: Slots, steps: Iterable[Step], budget: Budget, deployment: Deployment
) -> list[Sample]:
    """Move choices from `start` step by step; return the first subnet and every next one."""
    slots = {axis: list(indices) for axis, indices in start.items()}
    samples = [_sample(space, slots, budget, deployment)]
    for axis, slot, number in steps:
        slots[axis][slot] += number
        samples.append(_sample(space, slots, budget, deployment))
    return samples


def _sample(space: Space, chosen: Slots, budget: Budget, deployment: Deployment) -> Sample:
    subnet = space.subnet(chosen)
    used = subnet_cost(space.parent, subnet, deployment)
    ratio = float(used[budget.metric]) / budget.limit
    return Sample(subnet, used, ratio, abs(ratio - 1.0) <= budget.tolerance)


def choice_indices(space: Space, subnet: Subnet) -> dict[Axis, tuple[int, ...]]:
    """Return the choices, one index per slot of every elastic axis, that `Space.subnet` turns into these widths.

    Which layers are kept is not compared, only how many. Raises SpaceError for a width that is not among the choices.
    """
    found = {}
    for axis in space.elastic_axes():
        widths, choices = subnet.axis_widths(axis), space.axes[axis].choices
        if foreign := [width for width in widths if width not in choices]:
            raise SpaceError(f"{axis} width {foreign[0]} is not among the choices {list(choices)}")
        found[axis] = tuple(choices.index(width) for width in widths[: space.num_slots(axis)])
    return found


def subnet_between(space: Space, larger: Subnet, smaller: Subnet, budget: Budget, deployment: Deployment) -> Sample:
    """Return the subnet nearest to a budget on the way from one subnet of the space to another.

    Each choice goes from the one's to the other's in single steps, all spread evenly over the way, so that what lies
    between two trained subnets is like both. Layers leave by their ranking.
    """
    start, end = choice_indices(space, larger), choice_indices(space, smaller)
    steps: list[tuple[float, Axis, int, int]] = []
    for axis, indices in start.items():
        for slot, (first, last) in enumerate(zip(indices, end[axis], strict=True)):
            offset = (len(steps) + 1) * _GOLDEN_RATIO % 1.0  # so that the slots of an axis take turns
            for number in range(abs(last - first)):
                steps.append(((number + offset) / abs(last - first), axis, slot, 1 if last > first else -1))
    way = ((axis, slot, direction) for _, axis, slot, direction in sorted(steps))
    samples = _on_the_way(space, start, way, budget, deployment)
    return min(samples, key=lambda sample: abs(sample.ratio - 1.0))
