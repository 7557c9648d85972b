"""Curriculum phases: what changes from one part of a run to the next and where in it a step falls."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic.space.gates import Execution
from elastic.space.ranges import (
    Name,
    Ranks,
    Rate,
    Recompute,
    Scale,
    Sequences,
    Steps,
    StepsOrZero,
    Temperature,
    Tokens,
    TrainedLength,
    Weight,
)


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak` over `warmup_steps`, then constant, or a cosine to `min` at the phase's last step."""

    peak: Rate = 1e-3
    min: Rate = 0.0
    warmup_steps: StepsOrZero = 0
    schedule: Literal["constant", "cosine"] = "constant"

    def at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of step `step` of a phase of `num_steps`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        done = min((step - self.warmup_steps) / max(1, num_steps - 1 - self.warmup_steps), 1.0)
        return self.min + (self.peak - self.min) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class PhaseParallel:
    """What a phase has of its own of the run's section `parallel`; null: as the run has it."""

    tensor: Ranks | None = None
    pipeline: Ranks | None = None
    context: Ranks | None = None
    sequence: bool | None = None
    recompute: Recompute | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of any run. `global_batch` counts sequences; give `steps` or `tokens`, not both.

    `blend_weights` by name stand in the place of those of data.blend (empty: as there; a source left out: not read).
    `parallel` and `micro_batch` are its own layout; null: the run's. Where it changes, the run goes on from a
    checkpoint of its own, in the same processes.
    """

    name: Name
    sequence_length: TrainedLength = 256
    global_batch: Sequences = 8
    steps: Steps | None = None
    tokens: Tokens | None = None
    blend_weights: Mapping[str, Weight] = field(default_factory=dict)
    lr: LearningRate = field(default_factory=LearningRate)
    parallel: PhaseParallel | None = None
    micro_batch: Sequences | None = None

    @property
    def own_layout(self) -> dict[str, Any]:
        """Return what the phase gives of the section `parallel`, for `replace` of the run's."""
        return {name: value for name, value in vars(self.parallel or PhaseParallel()).items() if value is not None}

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one global batch."""
        return self.global_batch * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the phase; a token count is rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None, "the rules let exactly one of steps and tokens through"
        return math.ceil(self.tokens / self.tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class ElasticPhase(Phase):
    """One phase of the main job. `budget_weights` by budget name (empty: equal; a budget left out: never drawn).

    `temperature` and `logit_scale` run linearly from the first to the second value over the phase.
    """

    budget_weights: Mapping[str, Weight] = field(default_factory=dict)
    router_lr: LearningRate = field(default_factory=lambda: LearningRate(peak=1e-2))
    temperature: tuple[Temperature, Temperature] = (1.0, 0.05)
    logit_scale: tuple[Scale, Scale] = (1.0, 10.0)
    router_frozen: bool = False
    execution: Execution = Execution.MASK

    def weights(self, budget_names: Sequence[str]) -> tuple[float, ...]:
        """Return the weights in the order of the budgets."""
        given = self.budget_weights or dict.fromkeys(budget_names, 1.0)
        return tuple(given.get(name, 0.0) for name in budget_names)


@dataclass(frozen=True)
class Moment:
    """Where one step falls: the phase, the step inside it, and everything that depends on nothing else."""

    step: int
    phase_index: int
    phase: Phase
    step_in_phase: int

    @property
    def progress(self) -> float:
        """Return 0 at the first step of the phase, 1 at its last."""
        return self.step_in_phase / max(1, self.phase.num_steps - 1)

    @property
    def consumed_samples(self) -> int:
        """Return the sequences this phase has used before this step."""
        return self.step_in_phase * self.phase.global_batch

    @property
    def elastic(self) -> ElasticPhase:
        """Return the phase of a run that has budgets."""
        assert isinstance(self.phase, ElasticPhase), "only the main job asks"
        return self.phase

    @property
    def learning_rate(self) -> float:
        """Return the model's learning rate."""
        return self.phase.lr.at(self.step_in_phase, self.phase.num_steps)

    @property
    def router_learning_rate(self) -> float:
        """Return the router's learning rate."""
        return self.elastic.router_lr.at(self.step_in_phase, self.phase.num_steps)

    @property
    def temperature(self) -> float:
        """Return the Gumbel-softmax temperature."""
        return self._between(*self.elastic.temperature)

    @property
    def logit_scale(self) -> float:
        """Return the factor on the router's logits."""
        return self._between(*self.elastic.logit_scale)

    def _between(self, first: float, last: float) -> float:
        return first + (last - first) * self.progress


@dataclass(frozen=True)
class Curriculum:
    """Phases that follow each other in one run."""

    phases: Sequence[Phase]

    @property
    def total_steps(self) -> int:
        """Return the steps of all phases."""
        return sum(phase.num_steps for phase in self.phases)

    def at(self, step: int) -> Moment:
        """Return where `step` falls; raises ValueError beyond the last phase."""
        before = 0
        for index, phase in enumerate(self.phases):
            if step < before + phase.num_steps:
                return Moment(step, index, phase, step - before)
            before += phase.num_steps
        raise ValueError(f"step {step} lies beyond the curriculum's {before} steps")
