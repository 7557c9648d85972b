"""Loss spikes: a budget's loss far above what it recently was. Reported, and without effect on training."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

WINDOW = 32  # log intervals a loss is compared with; ours
MIN_HISTORY = 10
NORMAL = 1.4826  # median absolute deviation to standard deviation, for normal noise
RELATIVE_FLOOR = 0.01  # of the median: a loss that hardly moves may move by that much; ours


@dataclass(frozen=True)
class Spike:
    """One loss that stands out."""

    name: str
    loss: float
    usual: float
    deviations: float

    def __str__(self) -> str:
        above = f"{self.deviations:.1f} deviations above its usual {self.usual:.4g}"
        return f"loss spike: {self.name} {self.loss:.4g}, {above}"


@dataclass
class LossSpikes:
    """Compares each named loss with the median of its last WINDOW values; a sequence of phases starts anew in each."""

    threshold: float
    phase: int | None = None
    history: dict[str, deque[float]] = field(default_factory=dict)

    def take(self, name: str, loss: float, phase: int) -> Spike | None:
        """Take the next value of a loss; return a Spike if it lies more than `threshold` deviations above the usual."""
        if phase != self.phase:
            self.phase, self.history = phase, {}
        past = self.history.setdefault(name, deque(maxlen=WINDOW))
        spike = self._spike(name, loss, past) if len(past) >= MIN_HISTORY else None
        past.append(loss)
        return spike

    def _spike(self, name: str, loss: float, past: deque[float]) -> Spike | None:
        usual = median(past)
        spread = max(NORMAL * median(abs(value - usual) for value in past), RELATIVE_FLOOR * abs(usual), 1e-12)
        deviations = (loss - usual) / spread
        return Spike(name, loss, usual, deviations) if deviations > self.threshold else None
