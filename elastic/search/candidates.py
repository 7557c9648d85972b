"""Subnets between and around the trained budgets: proposed, priced all at once, and picked before a loss is known.

C candidates as choice indices [C, T] over the T slots of all elastic axes, in the order of Space.elastic_axes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch
from torch import Tensor

from elastic.router.router import gumbel_noise
from elastic.router.sampler import stream
from elastic.space.axes import AXES, Axis
from elastic.space.cost import Cost, Deployment, Widths, cost
from elastic.space.reach import choice_indices, smallest_subnet
from elastic.space.shape import Subnet
from elastic.space.space import Space

Logits = Mapping[Axis, Tensor]
SCALES = (1.0, 10.0)  # on the router's logits, as over a phase (docs/method.md 1.3): from open to nearly decided
MOST_STEPS = 0.5  # the largest share of slots that move by one choice around a budget
ROUNDS = 64  # of proposals; one without a new subnet ends them, too


@dataclass(frozen=True)
class Candidates:
    """Distinct subnets of a space, none of them a trained budget's, and how each was proposed."""

    space: Space
    indices: Tensor
    origins: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.origins)

    def subnet(self, row: int) -> Subnet:
        """Return one of them."""
        parts = split(self.space, self.indices[row])
        return self.space.subnet({axis: tuple(part.tolist()) for axis, part in parts.items()})

    def cost(self, deployment: Deployment) -> Cost:
        """Price all at once: every number [C] in fp64, exact for costs below 2^53."""
        parts, axes = split(self.space, self.indices), self.space.axes
        chosen = {axis: torch.nn.functional.one_hot(part, len(axes[axis].choices)) for axis, part in parts.items()}
        return cost(self.space.parent, Widths.expected(self.space, chosen), deployment)


def split(space: Space, flat: Tensor) -> dict[Axis, Tensor]:
    """Cut the last dimension of [..., T] into the slots of each elastic axis."""
    axes = space.elastic_axes()
    return dict(zip(axes, flat.split([space.num_slots(axis) for axis in axes], dim=-1), strict=True))


def joined(space: Space, subnet: Subnet) -> Tensor:
    """Return the choice indices [T] of a subnet; raises SpaceError for a width that is not among the choices."""
    chosen = choice_indices(space, subnet)
    return torch.tensor([index for axis in space.elastic_axes() for index in chosen[axis]])


def propose(
    space: Space,
    trained: Mapping[str, Subnet],
    logits: Mapping[str, Logits],
    number: int,
    seed: int,
    others: Sequence[Subnet] = (),
) -> Candidates:
    """Propose `number` candidates, or what there is, a pure function of the arguments; four kinds take turns.

    mix: every slot takes the choice of one of two budgets. between: every slot takes a choice between theirs. router:
    drawn from the router's probabilities of a budget, or half-way to another's. drop: a budget with other layers kept,
    by their ranking, and some slots one choice narrower, or wider. `logits` [slots, K] of every trained budget. None of
    them is proposed, nor one of `others`, which are subnets of the space, too.
    """
    ends = torch.stack([joined(space, subnet) for subnet in trained.values()])
    known = torch.stack([joined(space, subnet) for subnet in (*trained.values(), *others)])
    seen = {tuple(row) for row in _told_apart(space, known).tolist()}
    if len(ends) == 1:
        ends = torch.cat([ends, joined(space, smallest_subnet(space))[None]])
    own = [{axis: values.double() for axis, values in logits[name].items()} for name in trained]
    rows, origins = list[Tensor](), list[str]()
    for turn in range(ROUNDS):
        generator, count = stream(seed, "search", turn), number // 4 + 1
        kinds = {
            "mix": _mixed(ends, count, generator),
            "between": _between(ends, count, generator),
            "router": _drawn(space, own, count, seed, turn, generator),
            "drop": _dropped(space, ends[: len(own)], count, generator),
        }
        before = len(rows)
        for name, row, key in _in_turn(space, kinds):
            if len(rows) < number and key not in seen:
                seen.add(key)
                rows.append(row)
                origins.append(name)
        if len(rows) in (before, number):
            break
    flat = torch.stack(rows) if rows else torch.zeros(0, ends.shape[1], dtype=torch.int64)
    return Candidates(space, flat, tuple(origins))


def _in_turn(space: Space, kinds: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Yield the rows of all kinds in turn, with what tells one from another."""
    listed = [
        [(name, row, tuple(key)) for row, key in zip(rows, _told_apart(space, rows).tolist(), strict=True)]
        for name, rows in kinds.items()
    ]
    return (entry for entry in chain.from_iterable(zip_longest(*listed)) if entry is not None)


def running(space: Space, flat: Tensor) -> Tensor:
    """Return 1 for slots [C, T] that say something, and 0 for widths of layers that do not run; fp64."""
    parts = split(space, flat)
    depth = parts.get(Axis.DEPTH)
    layers = torch.ones(len(flat), len(space.parent.pattern), dtype=torch.float64)
    if depth is not None:
        layers = space.depth_table().double()[depth[:, 0]]
    shares = []
    for axis, part in parts.items():
        own = space.axes[axis].per_layer
        kind = AXES[axis].kind if own else None
        shares.append(torch.ones_like(part) if kind is None else layers[:, list(space.parent.pattern.layers_of(kind))])
    return torch.cat([share.double() for share in shares], dim=-1)


def _told_apart(space: Space, flat: Tensor) -> Tensor:
    """Return the indices with those of layers that do not run set to 0: equal for equal submodels."""
    return flat * running(space, flat).long()


def _pairs(ends: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw two different budgets [count, T] each, and a place between them [count, 1]."""
    first = torch.randint(len(ends), (count,), generator=generator)
    second = (first + torch.randint(1, len(ends), (count,), generator=generator)) % len(ends)
    return ends[first], ends[second], torch.rand(count, 1, generator=generator, dtype=torch.float64)


def _mixed(ends: Tensor, count: int, generator: torch.Generator) -> Tensor:
    first, second, share = _pairs(ends, count, generator)
    return torch.where(torch.rand(first.shape, generator=generator, dtype=torch.float64) < share, first, second)


def _between(ends: Tensor, count: int, generator: torch.Generator) -> Tensor:
    first, second, share = _pairs(ends, count, generator)
    place = first + (second - first) * share
    return (place + torch.rand(first.shape, generator=generator, dtype=torch.float64)).floor().long()


def _drawn(
    space: Space, logits: Sequence[Logits], count: int, seed: int, turn: int, generator: torch.Generator
) -> Tensor:
    budgets = torch.randint(len(logits), (2, count), generator=generator)
    low, high = SCALES
    scale = low * (high / low) ** torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)
    drawn = []
    for axis in space.elastic_axes():
        own = torch.stack([values[axis] for values in logits])
        noise = gumbel_noise(seed, turn, 0, axis, (count, *own.shape[1:])).double()
        drawn.append((scale * own[budgets].mean(0) + noise).argmax(-1))
    return torch.cat(drawn, dim=-1)


def _dropped(space: Space, budgets: Tensor, count: int, generator: torch.Generator) -> Tensor:
    rows = budgets[torch.randint(len(budgets), (count,), generator=generator)]
    share = MOST_STEPS * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    direction = 2 * torch.randint(2, (count, 1), generator=generator) - 1  # 1: narrower
    steps = torch.rand(rows.shape, generator=generator, dtype=torch.float64) < share
    parts = split(space, rows + direction * steps)
    for axis, part in parts.items():
        part.clamp_(0, len(space.axes[axis].choices) - 1)
    if Axis.DEPTH in parts:
        depths = len(space.axes[Axis.DEPTH].choices)
        other = torch.randint(1, depths, (count, 1), generator=generator)
        parts[Axis.DEPTH] = (split(space, rows)[Axis.DEPTH] + other) % depths
    return torch.cat(list(parts.values()), dim=-1)


def likelihood(candidates: Candidates, used: Tensor, trained: Sequence[tuple[float, Logits]]) -> Tensor:
    """Return the mean log probability [C] of the running slots' choices under the router, between its budgets.

    `trained` are costs and logits of the budgets, `used` [C] the candidates' costs: the logits of the two budgets a
    cost lies between are mixed as it lies between theirs.
    """
    space, ordered = candidates.space, sorted(trained, key=lambda pair: pair[0])
    costs = torch.tensor([cost for cost, _ in ordered], dtype=torch.float64)
    above = torch.searchsorted(costs, used.contiguous()).clamp(0, len(costs) - 1)
    below = (above - 1).clamp(min=0)
    gap = costs[above] - costs[below]
    share = torch.where(gap > 0, (used - costs[below]) / gap.clamp(min=1e-300), torch.ones_like(gap)).clamp(0.0, 1.0)
    found = []
    for axis, part in split(space, candidates.indices).items():
        own = torch.stack([logits[axis].double() for _, logits in ordered])  # [budgets, slots, K]
        mixed = own[below] + (own[above] - own[below]) * share[:, None, None]
        found.append(torch.log_softmax(mixed, -1).gather(-1, part[..., None])[..., 0])
    weights = running(space, candidates.indices)
    return (torch.cat(found, -1) * weights).sum(-1) / weights.sum(-1)


def pick(used: Tensor, likely: Tensor, allowed: Tensor, number: int) -> list[int]:
    """Return up to `number` allowed candidates, cheapest first: the likeliest of each of as many bands of equal cost.

    Where bands are empty, the likeliest of all that are left fill up. `used`, `likely`, `allowed` [C].
    """
    rows = allowed.nonzero().flatten().tolist()
    if not rows:
        return []
    low, high = (float(end) for end in (used[allowed].min(), used[allowed].max()))
    width = (high - low) / number
    best: dict[int, int] = {}
    by_likelihood = sorted(rows, key=lambda row: (-float(likely[row]), row))
    for row in by_likelihood:
        band = min(int((float(used[row]) - low) / width), number - 1) if width > 0 else 0
        best.setdefault(band, row)
    chosen = set(best.values())
    chosen.update([row for row in by_likelihood if row not in chosen][: number - len(chosen)])
    return sorted(chosen, key=lambda row: (float(used[row]), row))
