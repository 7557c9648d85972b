"""What a router chooses for a budget: the likeliest subnet that meets it (ours; the paper takes the argmax).

The budget loss sees an expected cost, which is multilinear in the choices' probabilities. Where choices are coarse it
has corners off the target that every single move makes worse, and a router can settle in one: 3 to 9% off in spaces of
nine layers, though other subnets meet the budget. So the argmax stands where it is within the budget's tolerance; else
those choices change whose log-probabilities lose least until it is. Late in a phase the router is pulled to them
(draw.py), so that the argmax changes itself while the weights still follow.

A axes with one choice, S slots of axes with a choice per layer, K choices, C combinations of the A axes' choices.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.router.router import Router
from elastic.space.axes import AXES, INNER_AXIS, Axis
from elastic.space.cost import PADDED, Budget, Deployment, Metric, subnet_cost
from elastic.space.reach import homogeneous, ratios
from elastic.space.shape import Subnet
from elastic.space.space import Space

Chosen = dict[Axis, tuple[int, ...]]  # choice indices, one per slot
GRAINS = 32  # sums of costs closer than a tolerance by this are one to the search, which keeps the likelier


class RouterError(ValueError):
    """A router that no choice can be read from."""


def decide(router: Router, space: Space, index: int, budget: Budget, deployment: Deployment) -> Subnet:
    """Return the subnet of `choose`."""
    return space.subnet(choose(router, space, index, budget, deployment))


def choose(router: Router, space: Space, index: int, budget: Budget, deployment: Deployment) -> Chosen:
    """Return what the router chooses for its budget number `index`: no noise, ties to the wider choice.

    The argmax if it meets `budget` within its tolerance, else the likeliest subnet that does. Where none does, the
    tolerance doubles until one does or the argmax itself is that near. The same on every rank: a pure function.

    Raises RouterError for logits that are NaN or Inf, whose argmax would be a subnet like any other.
    """
    logits = checked_logits(router, index)
    return in_place_of_argmax(logits, space, budget, deployment) or argmax(logits)


def in_place_of_argmax(
    logits: Mapping[Axis, Tensor], space: Space, budget: Budget, deployment: Deployment
) -> Chosen | None:
    """Return what `choose` takes for the argmax of one budget's logits [slots, K]; None where the argmax stands."""
    used = subnet_cost(space.parent, space.subnet(argmax(logits)), deployment)[budget.metric]
    missed, tolerance = abs(float(used) / budget.limit - 1.0), budget.tolerance
    if missed <= tolerance:
        return None
    regrets = {axis: (values.amax(-1, keepdim=True) - values).double().cpu() for axis, values in logits.items()}
    while missed > tolerance:
        search = _Search(space, budget, deployment, regrets, tolerance)
        if (found := search.likeliest()) is not None:
            return found
        tolerance *= 2
    return None


def likeliest(router: Router, space: Space, index: int) -> Subnet:
    """Return the subnet of the argmax, on its budget or not: how far the router has come by itself."""
    return space.subnet(argmax(checked_logits(router, index)))


def argmax(logits: Mapping[Axis, Tensor]) -> Chosen:
    """Return the argmax of every slot; of equal ones the first, which is the widest choice."""
    return {axis: tuple(values.argmax(-1).tolist()) for axis, values in logits.items()}


@torch.no_grad()
def checked_logits(router: Router, index: int) -> dict[Axis, Tensor]:
    """Return the logits [slots, K] of one budget; raises RouterError unless all are finite."""
    logits = {axis: values[index] for axis, values in router().items()}
    wrong = [axis.value for axis, values in logits.items() if not bool(values.isfinite().all())]
    if wrong:
        raise RouterError(
            f"router: its logits for budget {index} (counted from 0) are NaN or Inf on {', '.join(wrong)}, so it "
            "chooses nothing; its weights are damaged: take an earlier checkpoint"
        )
    return logits


@dataclass(frozen=True)
class _Search:
    """The likeliest subnet within a tolerance of a budget.

    Widths multiply only across axes with one choice for all layers; between layers with a choice of their own costs
    add. So all combinations of the former are listed, and inside one the slots are a knapsack. `regrets` [slots, K]: by
    how much log-probability each choice lies below its slot's likeliest.
    """

    space: Space
    budget: Budget
    deployment: Deployment
    regrets: Mapping[Axis, Tensor]
    tolerance: float

    def likeliest(self) -> Chosen | None:
        """Return its choices, None if no subnet is that near."""
        outer = [axis for axis in self.regrets if len(self.regrets[axis]) == 1 or self._by_widest(axis)]
        inner = [axis for axis in self.regrets if axis not in outer]
        sizes = [torch.arange(self.regrets[axis].shape[-1]) for axis in outer]
        rows = torch.cartesian_prod(*sizes).reshape(-1, len(outer)) if outer else torch.zeros(1, 0, dtype=torch.long)
        combinations = dict(zip(outer, rows.T, strict=True))  # [C] each
        lost = torch.zeros(len(rows), dtype=torch.float64)
        for axis, indices in combinations.items():
            # Of an axis that counts by its widest layer the others may be any narrower.
            lost += self.regrets[axis].flip(-1).cummin(-1).values.flip(-1).sum(0)[indices]
        start, costs = self._costs(combinations, inner, len(rows))
        bounds = lost + self._least_losses(start, costs, combinations)
        best: tuple[float, Chosen] | None = None
        for row in bounds.argsort(stable=True).tolist():
            if math.isinf(bounds[row]) or (best is not None and bounds[row] >= best[0]):
                break  # the rest reaches no budget, or loses more
            taken = {axis: int(indices[row]) for axis, indices in combinations.items()}
            own_costs = {axis: own[row] for axis, own in costs.items()}
            found = self._complete(taken, float(start[row]), own_costs, math.inf if best is None else best[0])
            best = found if found is not None else best
        return None if best is None else best[1]

    def _by_widest(self, axis: Axis) -> bool:
        """Tell whether the metric counts all layers of an axis as wide as the widest of them."""
        return self.budget.metric is Metric.STORED_PARAMS and axis in [INNER_AXIS[kind] for kind in PADDED]

    def _costs(
        self, combinations: Mapping[Axis, Tensor], inner: Sequence[Axis], count: int
    ) -> tuple[Tensor, dict[Axis, Tensor]]:
        """Return cost / target [C] with all slots full, and what one slot adds to it by choice [C, K].

        An axis is elastic only where all layers of its kind are alike, so each of those that run adds the same.
        """
        alike = homogeneous(self.space)
        full = {axis: indices[:, None] for axis, indices in combinations.items()}
        full |= {axis: torch.zeros(count, 1, dtype=torch.long) for axis in inner}
        start = ratios(alike, full, self.budget, self.deployment)
        costs = {}
        for axis in inner:
            running = self._running(axis, combinations, count).sum(-1).clamp(min=1)
            narrowed = [
                ratios(alike, {**full, axis: torch.full((count, 1), index)}, self.budget, self.deployment)
                for index in range(self.regrets[axis].shape[-1])
            ]
            costs[axis] = (torch.stack(narrowed, -1) - start[:, None]) / running[:, None]
        return start, costs

    def _running(self, axis: Axis, combinations: Mapping[Axis, Tensor], count: int) -> Tensor:
        """Return 0/1 [C, slots]: whose layers run at the depth taken."""
        depths = self.space.axes[Axis.DEPTH].choices
        kinds = self.space.parent.pattern.kinds
        layers = [layer for layer, kind in enumerate(kinds) if kind is AXES[axis].kind]
        table = torch.tensor([[layer in self.space.kept_layers(depth) for layer in layers] for depth in depths])
        return table[combinations.get(Axis.DEPTH, torch.zeros(count, dtype=torch.long))].double()

    def _least_losses(self, start: Tensor, costs: Mapping[Axis, Tensor], combinations: Mapping[Axis, Tensor]) -> Tensor:
        """Return a lower bound [C] of what the slots lose to meet the budget, inf where they cannot.

        Lagrange's: for any price of cost, the least of loss + price x (cost - edge of the tolerance).
        """
        low, high = 1.0 - self.tolerance, 1.0 + self.tolerance
        running = {axis: self._running(axis, combinations, len(start)) for axis in costs}
        least = start + sum(own.amin(-1) * running[axis].sum(-1) for axis, own in costs.items())
        most = start + sum(own.amax(-1) * running[axis].sum(-1) for axis, own in costs.items())
        bounds = torch.zeros_like(start)
        for price in [sign * 1.5**power for power in range(-12, 28) for sign in (-1.0, 1.0)]:
            total = price * (start - (high if price > 0 else low))
            for axis, own in costs.items():
                cheapest = (self.regrets[axis] + price * own[:, None]).amin(-1)  # [C, slots]
                total = total + (cheapest * running[axis]).sum(-1)
            bounds = torch.maximum(bounds, total)
        return bounds.masked_fill((least > high) | (most < low), math.inf)

    def _complete(
        self, taken: Mapping[Axis, int], start: float, costs: Mapping[Axis, Tensor], bound: float
    ) -> tuple[float, Chosen] | None:
        """Fill the slots of the inner axes so that the budget is met; return loss below `bound` and choices."""
        at = {axis: torch.tensor([index]) for axis, index in taken.items()}
        running = {
            axis: self._running(axis, at, 1)[0].nonzero().flatten().tolist()
            for axis, values in self.regrets.items()
            if len(values) > 1
        }
        chosen = {axis: [int(index) for index in values.argmin(-1)] for axis, values in self.regrets.items()}
        for axis, index in taken.items():
            chosen[axis] = _capped(self.regrets[axis], index, running[axis]) if axis in running else [index]
        slots = [(axis, slot) for axis in costs for slot in running[axis]]
        settled = [axis for axis in self.regrets if axis not in costs]
        lost = sum(float(self.regrets[axis][range(len(chosen[axis])), chosen[axis]].sum()) for axis in settled)
        filled = self._fill(start, [(costs[axis], self.regrets[axis][slot]) for axis, slot in slots], bound - lost)
        if filled is None:
            return None
        for (axis, slot), index in zip(slots, filled[1], strict=True):
            chosen[axis][slot] = index
        return lost + filled[0], {axis: tuple(own) for axis, own in chosen.items()}

    def _fill(
        self, start: float, options: Sequence[tuple[Tensor, Tensor]], bound: float
    ) -> tuple[float, list[int]] | None:
        """Pick one of each slot's options (cost [K], loss [K]): the sum of costs near 1, that of losses least, < bound.

        A knapsack over sums of costs in grains of the tolerance: of two sums in one grain the likelier stays, with its
        own exact cost, so no rounding adds up.
        """
        low, high = 1.0 - self.tolerance, 1.0 + self.tolerance
        # What the slots after each one can still add.
        rest = [(sum(float(c.min()) for c, _ in options[n:]), sum(float(c.max()) for c, _ in options[n:]))
                for n in range(1, len(options) + 1)]  # fmt: skip
        used, lost = torch.tensor([start], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        trail: list[tuple[Tensor, Tensor]] = []
        for (costs, losses), (least, most) in zip(options, rest, strict=True):
            count = len(costs)
            used, lost = (used[:, None] + costs).flatten(), (lost[:, None] + losses).flatten()
            alive = ((used + least <= high) & (used + most >= low) & (lost < bound)).nonzero().flatten()
            alive = alive[lost[alive].argsort(stable=True)]
            grains, order = (used[alive] * (GRAINS / self.tolerance)).floor().sort(stable=True)
            kept = alive[order[torch.cat([torch.ones(1, dtype=torch.bool), grains[1:] != grains[:-1]])[: len(order)]]]
            used, lost = used[kept], lost[kept]
            trail.append((kept // count, kept % count))
        if not len(used) or not low <= float(used[lost.argmin()]) <= high or float(lost.min()) >= bound:
            return None
        state, picks = int(lost.argmin()), []
        for before, picked in reversed(trail):
            picks.append(int(picked[state]))
            state = int(before[state])
        return float(lost.min()), picks[::-1]


def _capped(regrets: Tensor, widest: int, running: Sequence[int]) -> list[int]:
    """Return the likeliest choices [slots] of which none is wider than `widest`, and one that runs is."""
    allowed = regrets.clone()
    allowed[:, :widest] = math.inf
    own = [int(index) for index in allowed.argmin(-1)]
    if running and all(own[slot] != widest for slot in running):
        own[min(running, key=lambda slot: float(regrets[slot, widest] - regrets[slot, own[slot]]))] = widest
    return own
