"""From the router to the gates of a step's micro-batches, and the gradients back. Not part of the sharded graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from elastic.router.budget_loss import budget_loss, choice_entropy, cost_shares
from elastic.router.phases import Moment
from elastic.router.router import Router, choice_probabilities, gumbel_noise
from elastic.router.sampler import budget_of, draw_budgets, in_turn
from elastic.space.axes import Axis
from elastic.space.cost import Budget, Deployment, shape_cost
from elastic.space.gates import Execution, Gates
from elastic.space.ranges import Sequences, Size, Weight
from elastic.space.shape import Subnet
from elastic.space.space import Space

NUM_COST_DRAWS = 16  # ours; with 8, about one toy run in forty misses a budget by more than 3%
COST_STREAM = -1  # where a micro-batch's number stands in the noise streams of the gates


class RouterError(ValueError):
    """A router that no choice can be read from."""


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """Form of the routers, one per axis, and the weights of their own losses (docs/method.md 1.3; the entropy is ours).

    `mode` says what masks are made of while the router trains.

    A step's budgets are drawn `draws_per_step` times (null: as often as a replica has micro-batches), the noise of its
    gates `noise_draws_per_step` times (null: for every micro-batch). Each draw is for an equal run of the sequences of
    the global batch, so with both given the same samples get the same gates at every data-parallel and micro-batch
    size. A micro-batch has one budget, so it must not be larger than such a run, and divide it.
    """

    hidden_width: Size = 256
    mode: Literal["soft", "straight_through"] = "soft"
    budget_loss_weight: Weight = 1.0
    entropy_weight: Weight = 0.1
    draws_per_step: Sequences | None = None
    noise_draws_per_step: Sequences | None = None


@dataclass
class Draw:
    """The gates of one step on one replica, and the router's graph behind them."""

    gates: list[Gates]
    drawn: tuple[int, ...]  # the budgets of the whole step, for all replicas
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
            whole = shape_cost(self.space.parent, self.deployment)
            sizes = [(budget.limit / float(whole[budget.metric]), index) for index, budget in enumerate(self.budgets)]
            order.sort(key=lambda number: sizes[budget_of(drawn, number, in_step)])  # of one budget, as they come
        return [order[place] for place in places]

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
            frozen = {budget: self._frozen(budget, phase.execution) for budget in set(budgets)}
            return Draw([frozen[budget] for budget in budgets], drawn)
        logits = self.router()
        budget_losses = self._budget_losses(logits, moment)
        shares = cost_shares(self.space, self.budgets, self.deployment)
        entropy = choice_entropy(logits, moment.logit_scale, shares)
        undecided = self.settings.entropy_weight * (1.0 - moment.progress) * entropy
        router_loss = self.settings.budget_loss_weight * (budget_losses.sum() - undecided)
        draw = Draw([], drawn, budget_losses=budget_losses, router_loss=router_loss)
        noise_draws = self.settings.noise_draws_per_step or in_step
        for number, budget in zip(numbers, budgets, strict=True):
            noise_draw = number * noise_draws // in_step  # equal runs of micro-batches, as for the budgets
            source = {axis: self._weights(values[budget], axis, moment, noise_draw) for axis, values in logits.items()}
            leaves = {axis: weights.detach().clone().requires_grad_() for axis, weights in source.items()}
            draw.sources.append(source)
            draw.gates.append(Gates.mask(leaves, budget))
        return draw

    def _budget_losses(self, logits: Mapping[Axis, Tensor], moment: Moment) -> Tensor:
        """Return the budget loss [budgets] of the choices the layers see, a mean over noise draws of its own stream.

        All budgets count at every step, drawn or not: the cost needs no data. With the noise of the gates, and not on
        noise-free probabilities, a slot cannot rest half-way between two widths and be rounded off target at the end.
        """
        noisy = {axis: self._noisy(own, axis, moment, COST_STREAM, NUM_COST_DRAWS) for axis, own in logits.items()}
        return budget_loss(self.space, self.budgets, noisy, self.deployment).mean(dim=0)

    def _weights(self, logits: Tensor, axis: Axis, moment: Moment, noise_draw: int) -> Tensor:
        """Return weights [slots, K] over the choices: soft, or exactly one-hot with the soft gradient."""
        soft = self._noisy(logits, axis, moment, noise_draw)
        # Straight through: the bracket is exactly 0 and has the soft gradient.
        return soft if self.settings.mode == "soft" else _one_hot(soft) + (soft - soft.detach())

    def _noisy(self, logits: Tensor, axis: Axis, moment: Moment, noise_draw: int, *times: int) -> Tensor:
        """Return the choice probabilities of logits [..., K] under Gumbel noise, [*times, ..., K]."""
        noise = gumbel_noise(self.seed, moment.step, noise_draw, axis, (*times, *logits.shape)).to(logits.device)
        return choice_probabilities(logits, noise, moment.logit_scale, moment.temperature)

    def _frozen(self, budget: int, execution: Execution) -> Gates:
        if execution is Execution.SLICE:
            return Gates.slice(decide(self.router, self.space, budget), budget)
        with torch.no_grad():
            logits = _decided(self.router, budget)
            return Gates.mask({axis: _one_hot(values) for axis, values in logits.items()}, budget)


def _one_hot(values: Tensor) -> Tensor:
    """Return the one-hot of the largest entry; of equal ones the first, which is the widest choice."""
    return torch.nn.functional.one_hot(values.argmax(dim=-1), values.shape[-1]).to(torch.float32)


@torch.no_grad()
def decide(router: Router, space: Space, budget: int) -> Subnet:
    """Return the subnet a router chooses for a budget: argmax, no noise, ties to the wider choice.

    Raises RouterError for logits that are NaN or Inf, whose argmax would be a subnet like any other.
    """
    return space.subnet({axis: tuple(values.argmax(-1).tolist()) for axis, values in _decided(router, budget).items()})


def _decided(router: Router, budget: int) -> dict[Axis, Tensor]:
    """Return the logits [slots, K] of one budget; raises RouterError unless all are finite."""
    logits = {axis: values[budget] for axis, values in router().items()}
    wrong = [axis.value for axis, values in logits.items() if not bool(values.isfinite().all())]
    if wrong:
        raise RouterError(
            f"router: its logits for budget {budget} (counted from 0) are NaN or Inf on {', '.join(wrong)}, so it "
            "chooses nothing; its weights are damaged: take an earlier checkpoint"
        )
    return logits
