"""The loop: one optimizer step in one screen; logging, validation, checkpoints and signals are callbacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.optim import Optimizer

from elastic.router.draw import GateSource
from elastic.router.phases import Curriculum, Place
from elastic.train.checkpoint import Trainable, TrainingState
from elastic.train.gate_gradients import sum_gate_gradients, sum_router_gradients
from elastic.train.optimizer import set_learning_rate
from elastic.train.parallel import World
from elastic.train.phase_data import PhaseData
from elastic.train.pipeline import MicroBatchLoss, PipelineRunner
from elastic.train.record import Record


@dataclass(frozen=True)
class StepResult:
    """What one step leaves for the callbacks. Losses are sums of this rank's tokens (last stage only)."""

    step: int
    place: Place
    losses: Sequence[MicroBatchLoss]
    num_tokens: int
    grad_norm: float
    skipped: bool
    learning_rate: float
    router_learning_rate: float | None = None
    budget_losses: torch.Tensor | None = None


class Callback(Protocol):
    """Something that happens around steps. Methods run on every rank."""

    def on_start(self, trainer: "Trainer") -> None: ...

    def after_step(self, trainer: "Trainer", result: StepResult) -> None: ...

    def on_end(self, trainer: "Trainer") -> None: ...


@dataclass
class Trainer:
    """One training run, parent or elastic (then `gates` and `router_optimizer` are there).

    `carried_from` is the checkpoint whose export settings and tokenizer go into this run's checkpoints.
    """

    world: World
    runner: PipelineRunner
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    data: PhaseData
    curriculum: Curriculum
    record: Record
    run_folder: Path
    seed: int
    config: dict[str, Any]
    origin: Mapping[str, Any]
    total_steps: int
    gates: GateSource | None = None
    router_optimizer: Optimizer | None = None
    carried_from: Path | None = None
    callbacks: list[Callback] = field(default_factory=list)
    step: int = 0
    stop_reason: str | None = None

    def fit(self) -> None:
        """Train from `step` to `total_steps`, or until a callback sets `stop_reason`."""
        for callback in self.callbacks:
            callback.on_start(self)
        while self.step < self.total_steps and self.stop_reason is None:
            result = self.train_step()
            self.step += 1
            for callback in self.callbacks:
                callback.after_step(self, result)
        for callback in self.callbacks:
            callback.on_end(self)

    def train_step(self) -> StepResult:
        """Run one optimizer step over the global batch."""
        place = self.curriculum.at(self.step)
        batches = self.data.micro_batches(place)
        # 1. A budget for every micro-batch, and the router's gates for it.
        replica, replicas = self.world.data_rank, self.world.data_size
        draw = None if self.gates is None else self.gates.draw(place, len(batches), replica, replicas)
        choices = [None] * len(batches) if draw is None else draw.gates
        work = [self.runner.micro_batch(batch, gates) for batch, gates in zip(batches, choices, strict=True)]
        # 2. The teacher's hidden states, then the student forward and backward under its gates.
        work = self.runner.with_teacher(work)
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.runner.forward_backward(work)
        # 3. Through the gates to the router, outside the sharded graph.
        router_lr, budget_losses = None, None
        if self.gates is not None and draw is not None:
            budget_losses = draw.budget_losses
            router_lr = self._router_step(place, draw)
        # 4. Weights.
        set_learning_rate(self.optimizer, place.learning_rate)
        updated, grad_norm, _ = self.optimizer.step()
        return StepResult(
            step=self.step,
            place=place,
            losses=losses,
            num_tokens=place.phase.tokens_per_step,
            grad_norm=float(grad_norm or 0.0),
            skipped=not updated,
            learning_rate=place.learning_rate,
            router_learning_rate=router_lr,
            budget_losses=budget_losses,
        )

    def _router_step(self, place: Place, draw: Any) -> float | None:
        """Push the gates' gradients through the router once and step it; nothing happens while it is frozen."""
        if place.phase.router_frozen:
            return None
        assert self.gates is not None and self.router_optimizer is not None
        # The task loss is a mean over the tokens of the global batch; gate gradients are sums over one replica.
        flat = sum_gate_gradients(draw.flat_gradients(), draw.entries(), self.world) / place.phase.tokens_per_step
        self.router_optimizer.zero_grad(set_to_none=False)
        draw.push(flat, router_loss_scale=1.0 / self.world.data_size)
        sum_router_gradients(self.gates.router.parameters(), self.world)
        set_learning_rate(self.router_optimizer, place.router_learning_rate)
        self.router_optimizer.step()
        return place.router_learning_rate

    def trainable(self) -> Trainable:
        """Return what a checkpoint holds."""
        router = None if self.gates is None else self.gates.router
        return Trainable(self.runner.student_model, self.optimizer, router, self.router_optimizer)

    def training_state(self) -> TrainingState:
        """Return what a checkpoint holds beside tensors."""
        return TrainingState(self.step, self.seed, self.config, self.origin)
