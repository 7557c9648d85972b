"""Schedules: pure functions of progress or of the step inside a phase."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A value that runs linearly from `start` to `end` over a phase."""

    start: float
    end: float

    def at(self, progress: float) -> float:
        """Return the value at `progress` in [0, 1]."""
        return self.start + (self.end - self.start) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak` over `warmup_steps`, then constant, or a cosine down to `minimum` at the last step."""

    peak: float
    minimum: float = 0.0
    warmup_steps: int = 0
    cosine: bool = False

    def at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of step `step` of a phase of `num_steps`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if not self.cosine:
            return self.peak
        done = (step - self.warmup_steps) / max(1, num_steps - 1 - self.warmup_steps)
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
