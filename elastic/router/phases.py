"""Curriculum phases: what changes from one part of a run to the next, and where in it a step falls."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from elastic.router.schedules import LearningRate, Linear
from elastic.space.gates import Execution


@dataclass(frozen=True)
class Phase:
    """One part of a run. `global_batch` counts sequences; a run without budgets leaves the router's fields alone."""

    name: str
    sequence_length: int
    global_batch: int
    num_steps: int
    learning_rate: LearningRate
    budget_weights: tuple[float, ...] = ()
    router_learning_rate: LearningRate = field(default_factory=lambda: LearningRate(0.0))
    temperature: Linear = field(default_factory=lambda: Linear(1.0, 1.0))
    logit_scale: Linear = field(default_factory=lambda: Linear(1.0, 1.0))
    router_frozen: bool = True
    execution: Execution = Execution.MASK

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one global batch."""
        return self.global_batch * self.sequence_length


@dataclass(frozen=True)
class Place:
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
    def learning_rate(self) -> float:
        """Return the model's learning rate."""
        return self.phase.learning_rate.at(self.step_in_phase, self.phase.num_steps)

    @property
    def router_learning_rate(self) -> float:
        """Return the router's learning rate."""
        return self.phase.router_learning_rate.at(self.step_in_phase, self.phase.num_steps)

    @property
    def temperature(self) -> float:
        """Return the Gumbel-softmax temperature."""
        return self.phase.temperature.at(self.progress)

    @property
    def logit_scale(self) -> float:
        """Return the factor on the router's logits."""
        return self.phase.logit_scale.at(self.progress)


@dataclass(frozen=True)
class Curriculum:
    """Phases that follow each other in one run."""

    phases: Sequence[Phase]

    @property
    def total_steps(self) -> int:
        """Return the steps of all phases."""
        return sum(phase.num_steps for phase in self.phases)

    def at(self, step: int) -> Place:
        """Return where `step` falls; raises ValueError beyond the last phase."""
        before = 0
        for index, phase in enumerate(self.phases):
            if step < before + phase.num_steps:
                return Place(step, index, phase, step - before)
            before += phase.num_steps
        raise ValueError(f"step {step} lies beyond the curriculum's {before} steps")
