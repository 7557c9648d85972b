"""From the router to the gates of a step's micro-batches, and the gradients back. Not part of the sharded graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

from elastic.router.budget_loss import budget_loss, choice_entropy, cost_shares, pull
from elastic.router.decide import choose, decide, in_place_of_argmax
from elastic.router.phases import ElasticPhase, Moment
from elastic.router.router import Router, choice_probabilities, gumbel_noise
from elastic.router.sampler import budget_of, draw_budgets, in_turn
from elastic.space.axes import Axis
from elastic.space.cost import Budget, Deployment, shape_cost
from elastic.space.gates import Execution, Gates
from elastic.space.ranges import Sequences, Size, Weight
from elastic.space.shape import Subnet
from elastic.space.space import Space

NUM_COST_DRAWS = 16  # ours; with 8, about one toy run in forty misses a budget by more than 3%
# Of a phase that trains the router; ours. Late, since until then many come to their budgets by themselves (make smoke's
# small at four fifths), and early enough to move, which takes some 20 steps, and for weights to follow.
PULLED_FROM = 5 / 6
COST_STREAM = -1  # where a micro-batch's number stands in the noise streams of the gates


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """Form of the routers, one per axis, and the weights of their own losses (docs/method.md 1.3; the entropy is ours).

    `mode` says what masks are made of while the router trains; `start` where it begins: with every choice about as
    likely (uniform), or, for each budget, at the even cut that loses least before any training (train/start.py).

    A step's budgets are drawn `draws_per_step` times (null: as often as a replica has micro-batches), the noise of its
    gates `noise_draws_per_step` times (null: for every micro-batch). Each draw is for an equal run of the sequences of
    the global batch, so with both given the same samples get the same gates at every data-parallel and micro-batch
    size. A micro-batch has one budget, so it must not be larger than such a run, and divide it.
    """

    hidden_width: Size = 256
    mode: Literal["soft", "straight_through"] = "soft"
    start: Literal["uniform", "even_cuts"] = "uniform"
    budget_loss_weight: Weight = 1.0
    entropy_weight: Weight = 0.1
    draws_per_step: Sequences | None = None
    noise_draws_per_step: Sequences | None = None


@dataclass
class Draw:
    """The gates of one step on one replica, and the router's graph behind them.

    `ends_alike`: the replicas' last micro-batches compute the same layers and widths.
    """

    gates: list[Gates]
    drawn: tuple[int, ...]  # the budgets of the whole step, for all replicas
    ends_alike: bool = True
    sources: list[Mapping[Axis, Tensor]] = field(default_factory=list)
    budget_losses: Tensor | None = None
    router_loss: Tensor | None = None

    def entries(self) -> list[tuple[Axis, int]]:
        """List (axis, number of values) in the order of `flat_gradients`."""
        return [(axis, leaf.numel()) for gates in self.gates for axis, leaf in gates.weights.items()]

    def flat_gradients(self) -> Tensor:
        """Join the leaves' gradients of all micro-batches; zeros where this rank had none."""
        leaves = [leaf for gates in self.gates for leaf in gates.weights.values()]
        return torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).reshape(-1) for t in leaves])

    def push(self, flat: Tensor, router_loss_scale: float = 1.0) -> None:
        """Send summed gate gradients, in the order of `entries`, and the router's own loss through the router."""
        sources = [source for per_axis in self.sources for source in per_axis.values()]
        parts = zip(flat.split([source.numel() for source in sources]), sources, strict=True)
        gradients: list[Tensor] = [part.view_as(source) for part, source in parts]
        assert self.router_loss is not None
        total = self.router_loss * router_loss_scale
        torch.autograd.backward([*sources, total], [*gradients, torch.ones_like(total)])


@dataclass
class Chooser:
    """Draws budgets and gates for the steps of a run; everything random is a function of (seed, step, micro-batch)."""

    router: Router
    space: Space
    budgets: tuple[Budget, ...]
    deployment: Deployment
    settings: RouterSettings
    seed: int
    _frozen: tuple[ElasticPhase, Mapping[int, Gates]] | None = field(default=None, init=False)

    def numbers(self, moment: Moment, num_micro_batches: int, replica: int, replicas: int) -> list[int]:
        """Return which of a step's micro-batches, counted over all replicas, this one runs, in the order it does.

        Under slices the step goes from the smallest budget to the largest, as the budgets' targets say: neighbours in a
        pipeline then take equally long, all replicas but at the change to the next budget too, and the fullest comes
        last. A pure function of the config and the step, so that data can be read before the step begins.
        """
        in_step = num_micro_batches * replicas
        order, places = list(range(in_step)), in_turn(moment, num_micro_batches, replica, replicas)
        if moment.elastic.execution is Execution.SLICE:
            drawn = self._drawn(moment, num_micro_batches, in_step)
            order.sort(key=lambda number: self._sizes[budget_of(drawn, number, in_step)])  # of one budget, as they come
        return [order[place] for place in places]

    @cached_property
    def _sizes(self) -> list[tuple[float, int]]:
        """Of each budget its share of the parent, in its own metric, and its number: no two are equal."""
        whole = shape_cost(self.space.parent, self.deployment)
        return [(budget.limit / float(whole[budget.metric]), index) for index, budget in enumerate(self.budgets)]

    def _drawn(self, moment: Moment, num_micro_batches: int, in_step: int) -> tuple[int, ...]:
        """Draw the budgets of the step."""
        draws = self.settings.draws_per_step or num_micro_batches
        assert in_step % draws == 0, "the rules of the config refuse draws that cut through a micro-batch"
        weights = moment.elastic.weights([budget.name for budget in self.budgets])
        return draw_budgets(weights, self.seed, moment.step, draws)

    def draw(self, moment: Moment, num_micro_batches: int, replica: int, replicas: int) -> Draw:
        """Return the gates of this replica's micro-batches at one step, in the order of `numbers`."""
        phase, in_step = moment.elastic, num_micro_batches * replicas
        drawn = self._drawn(moment, num_micro_batches, in_step)
        numbers = self.numbers(moment, num_micro_batches, replica, replicas)
        budgets = [budget_of(drawn, number, in_step) for number in numbers]
        if phase.router_frozen:
            frozen = self._frozen_gates(moment)
            fullest = max(drawn, key=lambda budget: self._sizes[budget])  # runs last
            ends_alike = phase.execution is Execution.MASK or drawn.count(fullest) * in_step >= replicas * len(drawn)
            return Draw([frozen[budget] for budget in budgets], drawn, ends_alike)
        logits = self.router()
        noise_draws = self.settings.noise_draws_per_step or in_step
        # Equal runs of micro-batches share a draw of noise, as for the budgets.
        noise, cost_noise = self._noise(logits, moment, [number * noise_draws // in_step for number in numbers])
        budget_losses = self._budget_losses(logits, cost_noise, moment)
        entropy = choice_entropy(logits, moment.logit_scale, self._shares)
        undecided = self.settings.entropy_weight * (1.0 - moment.progress) * entropy
        own_losses = budget_losses.sum() - undecided
        if moment.progress >= PULLED_FROM:
            own_losses = own_losses + self._pull(logits, moment)
        router_loss = self.settings.budget_loss_weight * own_losses
        draw = Draw([], drawn, budget_losses=budget_losses, router_loss=router_loss)
        # All micro-batches at once, [micro-batches, slots, K], then cut apart.
        weights, leaves = {}, {}
        for axis, values in logits.items():
            asked = torch.stack([values[budget] for budget in budgets])
            together = self._weights(asked, noise[axis], moment)
            weights[axis], leaves[axis] = together.unbind(), together.detach().clone().unbind()
        for index, budget in enumerate(budgets):
            draw.sources.append({axis: values[index] for axis, values in weights.items()})
            draw.gates.append(Gates.mask({axis: leaf[index].requires_grad_() for axis, leaf in leaves.items()}, budget))
        return draw

    def decide(self, budget: int) -> Subnet:
        """Return the subnet of a budget as the router stands: no noise."""
        return decide(self.router, self.space, budget, self.budgets[budget], self.deployment)

    @cached_property
    def _shares(self) -> dict[Axis, Tensor]:
        """The shares of the cost, on the router's device."""
        device = next(self.router.parameters()).device
        shares = cost_shares(self.space, self.budgets, self.deployment)
        return {axis: share.to(device) for axis, share in shares.items()}

    def _noise(
        self, logits: Mapping[Axis, Tensor], moment: Moment, noise_draws: Sequence[int]
    ) -> tuple[dict[Axis, Tensor], dict[Axis, Tensor]]:
        """Return the noise of a step by axis: of its micro-batches' gates [draws, slots, K], and of the budget losses.

        Every axis and draw has a stream of its own, on the host; all of it goes to the device in one copy, behind which
        nothing waits.
        """
        shapes = {axis: tuple(values.shape) for axis, values in logits.items()}  # [budgets, slots, K]
        of_gates = [(axis, draw, shape[1:]) for axis, shape in shapes.items() for draw in noise_draws]
        of_costs = [(axis, COST_STREAM, (NUM_COST_DRAWS, *shape)) for axis, shape in shapes.items()]
        drawn = [gumbel_noise(self.seed, moment.step, draw, axis, shape) for axis, draw, shape in of_gates + of_costs]
        flat = _copied(torch.cat([part.reshape(-1) for part in drawn]), next(iter(logits.values())).device)
        sizes = [len(noise_draws) * prod(shape[1:]) for shape in shapes.values()]
        sizes += [NUM_COST_DRAWS * prod(shape) for shape in shapes.values()]
        split = iter(flat.split(sizes))
        gates = {axis: next(split).view(len(noise_draws), *shape[1:]) for axis, shape in shapes.items()}
        return gates, {axis: next(split).view(NUM_COST_DRAWS, *shape) for axis, shape in shapes.items()}

    def _budget_losses(self, logits: Mapping[Axis, Tensor], noise: Mapping[Axis, Tensor], moment: Moment) -> Tensor:
        """Return the budget loss [budgets] of the choices the layers see, a mean over noise draws of its own stream.

        All budgets count at every step, drawn or not: the cost needs no data. With the noise of the gates, and not on
        noise-free probabilities, a slot cannot rest half-way between two widths and be rounded off target at the end.
        """
        noisy = {
            axis: choice_probabilities(own, noise[axis], moment.logit_scale, moment.temperature)
            for axis, own in logits.items()
        }
        return budget_loss(self.space, self.budgets, noisy, self.deployment).mean(dim=0)

    def _pull(self, logits: Mapping[Axis, Tensor], moment: Moment) -> Tensor:
        """Return the pull of every budget whose argmax misses it towards the subnet that would be decided: a scalar.

        So that the argmax goes where the choice would be moved when the router freezes, while weights still follow.
        Decided anew at every step, from the logits alone: the same on all ranks, and nothing for a checkpoint. Waits
        for the device at the start of a step, when the last optimizer step is all that is under way.
        """
        total = torch.zeros((), device=next(iter(logits.values())).device)
        on_host = torch.cat([values.detach().flatten() for values in logits.values()]).cpu()  # one wait for all axes
        parts = on_host.split([values.numel() for values in logits.values()])
        for index, budget in enumerate(self.budgets):
            own = {axis: part.view_as(logits[axis])[index] for axis, part in zip(logits, parts, strict=True)}
            chosen = in_place_of_argmax(own, self.space, budget, self.deployment)
            if chosen is not None:
                wanted = {axis: _copied(torch.tensor(choices), total.device) for axis, choices in chosen.items()}
                total = total + pull(logits, moment.logit_scale, self._shares, index, wanted)
        return total

    def _weights(self, logits: Tensor, noise: Tensor, moment: Moment) -> Tensor:
        """Return weights [..., slots, K] over the choices: soft, or exactly one-hot with the soft gradient."""
        soft = choice_probabilities(logits, noise, moment.logit_scale, moment.temperature)
        # Straight through: the bracket is exactly 0 and has the soft gradient.
        return soft if self.settings.mode == "soft" else _one_hot(soft) + (soft - soft.detach())

    def _frozen_gates(self, moment: Moment) -> Mapping[int, Gates]:
        """Return the gates of each drawn budget in a phase that freezes the router: read from it once a phase."""
        phase = moment.elastic
        if self._frozen is None or self._frozen[0] is not phase:
            weights = phase.weights([budget.name for budget in self.budgets])
            self._frozen = phase, {b: self._decided(b, phase.execution) for b, weight in enumerate(weights) if weight}
        return self._frozen[1]

    @torch.no_grad()
    def _decided(self, budget: int, execution: Execution) -> Gates:
        chosen = choose(self.router, self.space, budget, self.budgets[budget], self.deployment)
        if execution is Execution.SLICE:
            return Gates.slice(self.space.subnet(chosen), budget)
        masks = {}
        for axis, indices in chosen.items():
            one_hot = torch.nn.functional.one_hot(torch.tensor(indices), len(self.space.axes[axis].choices))
            masks[axis] = one_hot.to(next(self.router.parameters()))
        return Gates.mask(masks, budget)


def _one_hot(values: Tensor) -> Tensor:
    """Return the one-hot of the largest entry; of equal ones the first, which is the widest choice."""
    return torch.nn.functional.one_hot(values.argmax(dim=-1), values.shape[-1]).to(torch.float32)


def _copied(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, and wait for nothing: what is not pinned first waits for a GPU."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
