"""Schedules: pure functions of progress or of the step inside a phase."""

import math
from dataclasses import dataclass
from typing import Literal

from elastic.space.ranges import Rate, StepsOrZero


def linear(ends: tuple[float, float], progress: float) -> float:
    """Return the value at `progress` in [0, 1] between two ends."""
    return ends[0] + (ends[1] - ends[0]) * min(max(progress, 0.0), 1.0)


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
