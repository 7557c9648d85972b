"""The loop: one optimizer step in one screen; logging, validation, checkpoints and signals are callbacks."""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from elastic.checkpoint.record import Record
from elastic.checkpoint.state import Trainable, TrainingState
from elastic.data.read_ahead import ReadAhead
from elastic.data.stream import Batch, PhaseData
from elastic.router.draw import Chooser, Draw
from elastic.router.phases import Curriculum, Moment
from elastic.space.shape import Subnet
from elastic.train.nonfinite import SkippedSteps
from elastic.train.optimizer import (
    apply_gradients,
    gradient_norm,
    set_learning_rate,
    sum_gate_gradients,
    sum_router_gradients,
)
from elastic.train.pipeline import MicroBatchLoss, PipelineRunner
from elastic.train.sanity import Sanity
from elastic.world.groups import World
from elastic.world.watchdog import Progress


@dataclass(frozen=True)
class StepResult:
    """What one step leaves for the callbacks. Losses are sums of this rank's tokens (last stage only).

    Tensors are on the device: who reads one waits for it.
    `skipped`: something was not finite, so neither weights nor router took the step, on any rank.
    """

    moment: Moment
    losses: Sequence[MicroBatchLoss]
    grad_norm: Tensor
    skipped: bool
    budget_losses: Tensor | None


class Callback:
    """Something that happens around steps, on every rank. Does nothing but what a kind of callback overrides."""

    def on_start(self, trainer: "Trainer") -> None: ...

    def after_step(self, trainer: "Trainer", result: StepResult) -> None: ...

    def before_move(self, trainer: "Trainer") -> None: ...

    def on_end(self, trainer: "Trainer") -> None: ...


@dataclass(kw_only=True)
class Placed:
    """What of a run follows its layout: made anew where a phase has another."""

    world: World
    runner: PipelineRunner
    wrapped: DistributedDataParallel
    optimizer: ChainedOptimizer
    data: PhaseData
    sanity: Sanity | None


@dataclass(kw_only=True)
class Trainer(Placed):
    """One training run, parent or elastic (then `chooser` and `router_optimizer` are there).

    `started` says what the run was started with; `carried_from` is the checkpoint whose export settings and tokenizer
    go into this run's checkpoints; `progress` is where this rank stands, for its watchdog. With the steps in `moves`
    the phases of another layout begin: `place` builds it and loads what the run saved at that step.
    """

    curriculum: Curriculum
    record: Record
    run_folder: Path
    started: TrainingState
    total_steps: int
    skipped: SkippedSteps
    chooser: Chooser | None = None
    router_optimizer: Optimizer | None = None
    carried_from: Path | None = None
    moves: Collection[int] = ()
    place: Callable[[int], Placed]
    progress: Progress = field(default_factory=Progress)
    callbacks: list[Callback] = field(default_factory=list)
    step: int = 0
    stop_reason: str | None = None

    def fit(self) -> None:
        """Train from `step` to `total_steps`, or until a callback sets `stop_reason`."""
        first = self.step
        for callback in self._entered("on_start"):
            callback.on_start(self)
        while self.step < self.total_steps and self.stop_reason is None:
            if self.step in self.moves and self.step > first:
                self._move()
                first = self.step
                continue  # a callback may have stopped the run before it moved
            end = min(step for step in (*self.moves, self.total_steps) if step > self.step)
            with ReadAhead(self.data.batches, self.curriculum, end) as data:
                while self.step < end and self.stop_reason is None:
                    result = self.train_step(data)
                    self.step += 1
                    for callback in self._entered("after_step"):
                        callback.after_step(self, result)
        for callback in self._entered("on_end"):
            callback.on_end(self)
        self.runner.finish_gather()

    def _move(self) -> None:
        """Go on in the layout of the phase that begins, as a resumed run does: a checkpoint loads at every layout.

        Nothing of the old one is left when the new one is built; router and callbacks stay as they are.
        """
        for callback in self._entered("before_move"):
            callback.before_move(self)
        if self.stop_reason is not None:
            return
        self.progress.enter(self.step, "another layout")
        for part in fields(Placed):
            delattr(self, part.name)
        del self.skipped.wrapped
        gc.collect()  # wrapper and optimizer stand in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of sizes that are not asked for again
        vars(self).update(vars(self.place(self.step)))
        self.skipped.wrapped, self.skipped.world = self.wrapped, self.world

    def _entered(self, method: str) -> Iterator[Callback]:
        """Yield the callbacks in turn, and leave a note for the watchdog which one is at work."""
        for callback in self.callbacks:
            self.progress.enter(self.step, f"{type(callback).__name__}.{method}")
            yield callback

    def train_step(self, data: ReadAhead) -> StepResult:
        """Run one optimizer step over the global batch; raises NonFiniteError after too many bad ones in a row."""
        moment, number = self.curriculum.at(self.step), self.step + 1
        self.progress.enter(number, "data and gates")
        batches = data.batches(moment)
        # 1. A budget for every micro-batch, and the router's gates for it.
        replica, replicas = self.world.data_rank, self.world.data_size
        draw = None if self.chooser is None else self.chooser.draw(moment, len(batches), replica, replicas)
        choices = [None] * len(batches) if draw is None else draw.gates
        work = [self.runner.share(batch, gates) for batch, gates in zip(batches, choices, strict=True)]
        if self.sanity is not None:
            self.runner.finish_gather()
            self.sanity.before_step(moment, batches, choices, () if draw is None else draw.drawn)
        # 2. The teacher's hidden states, then the student forward and backward under its gates.
        self.progress.enter(number, "teacher")
        work = self.runner.with_teacher(work)
        self.progress.enter(number, "forward and backward")
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.runner.forward_backward(work, ends_alike=draw is None or draw.ends_alike)
        # 3. Through the gates to the router, outside the sharded graph.
        self.progress.enter(number, "optimizer")
        router_gradients = self._router_gradients(moment, draw, batches)
        # 4. One decision for all ranks, then weights and router take the step, or neither does.
        grad_norm = gradient_norm(self.optimizer, self.world.device)
        bad = self.skipped.nonfinite(losses, grad_norm, router_gradients)
        if bad:
            self.skipped.step_skipped(bad, number, batches, choices, losses, float(grad_norm))
        else:
            self._update(moment, grad_norm, bool(router_gradients))
        if self.sanity is not None:
            self.runner.finish_gather()
            self.sanity.after_step(moment)
        budget_losses = None if draw is None else draw.budget_losses
        return StepResult(moment, losses, grad_norm, bool(bad), budget_losses)

    def _router_gradients(self, moment: Moment, draw: Draw | None, batches: Sequence[Batch]) -> list[Tensor]:
        """Push the gates' gradients through the router once, sum what came out over replicas, and return it.

        Empty where no router trains in this step.
        """
        if draw is None or moment.elastic.router_frozen:
            return []
        assert self.chooser is not None and self.router_optimizer is not None
        # The task loss is a mean over all tokens of the global batch that count; gate gradients are sums over one
        # replica, all of whose ranks read the same whole sequences.
        counted: Tensor | int = moment.phase.tokens_per_step
        if self.data.is_masked:
            here = sum(batch.num_counted() for batch in batches)
            counted = torch.full((), here, device=self.world.device)
            torch.distributed.all_reduce(counted, group=self.world.groups.dp)
            counted.clamp_(min=1)
        flat = sum_gate_gradients(draw.flat_gradients(), draw.entries(), self.world) / counted
        self.router_optimizer.zero_grad(set_to_none=False)
        draw.push(flat, router_loss_scale=1.0 / self.world.data_size)
        return sum_router_gradients(self.chooser.router.parameters(), self.world)

    def _update(self, moment: Moment, grad_norm: Tensor, trains_router: bool) -> None:
        """Step the weights, and the router where it trains."""
        self.skipped.in_a_row.clear()
        set_learning_rate(self.optimizer, moment.learning_rate)
        apply_gradients(self.optimizer, grad_norm)
        self.runner.start_gather()
        if trains_router:
            assert self.router_optimizer is not None
            set_learning_rate(self.router_optimizer, moment.router_learning_rate)
            self.router_optimizer.step()

    def chosen_subnets(self) -> dict[str, Subnet]:
        """Return the subnet the router now chooses for every budget (router/decide.py); the parent without budgets."""
        if self.chooser is None:
            return {"parent": Subnet.full(self.record.shape)}
        return {budget.name: self.chooser.decide(index) for index, budget in enumerate(self.chooser.budgets)}

    def trainable(self) -> Trainable:
        """Return what a checkpoint holds, its weights gathered."""
        self.runner.finish_gather()
        router = None if self.chooser is None else self.chooser.router
        return Trainable(self.runner.student_model, self.optimizer, router, self.router_optimizer)

    def training_state(self) -> TrainingState:
        """Return what a checkpoint holds beside tensors."""
        return replace(self.started, step=self.step)
