"""What happens around the steps of a run: its numbers, validation. save_checkpoints.py saves, signals.py stops."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from elastic.config.sections import TrainerConfig
from elastic.data.stream import HeldOut, source_labels
from elastic.router.phases import Moment
from elastic.space.cost import subnet_cost
from elastic.space.gates import Gates
from elastic.train.evaluation import LossMeter, MeanLoss, evaluate_subnets
from elastic.train.log import RunLog
from elastic.train.nonfinite import NONFINITE_FOLDER
from elastic.train.trainer import Callback, StepResult, Trainer
from elastic.world.groups import World

WINDOW = 32  # log intervals a loss is compared with; ours
MIN_HISTORY = 10
NORMAL = 1.4826  # median absolute deviation to standard deviation, for normal noise
RELATIVE_FLOOR = 0.01  # of the median: a loss that hardly moves may move by that much; ours


@dataclass(frozen=True)
class Spike:
    """A budget's loss far above what it recently was. Reported, and without effect on training."""

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

    threshold: float | None
    phase: int | None = None
    history: dict[str, deque[float]] = field(default_factory=dict)

    def take(self, name: str, loss: float, phase: int) -> Spike | None:
        """Take the next value of a loss; return a Spike if it lies more than `threshold` deviations above the usual."""
        if phase != self.phase:
            self.phase, self.history = phase, {}
        history = self.history.setdefault(name, deque(maxlen=WINDOW))
        past = tuple(history)
        history.append(loss)
        if self.threshold is None or len(past) < MIN_HISTORY:
            return None
        usual = median(past)
        spread = max(NORMAL * median(abs(value - usual) for value in past), RELATIVE_FLOOR * abs(usual), 1e-12)
        deviations = (loss - usual) / spread
        return Spike(name, loss, usual, deviations) if deviations > self.threshold else None


class LogSteps(Callback):
    """Reduces the losses every n steps, writes them and shows them: loss per budget, cost ratio, tokens/s, ETA."""

    def __init__(
        self, log: RunLog, budget_names: Sequence[str], settings: TrainerConfig, console: Console, world: World
    ) -> None:
        self.log, self.names, self.every_steps = log, budget_names, settings.log_every_n_steps
        bar = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        texts = ("[bold]{task.description}", "{task.fields[status]}")
        self.progress = Progress(texts[0], *bar, texts[1], console=console, disable=not world.is_main)
        self._task = TaskID(0)
        self._meter = LossMeter(len(budget_names), world)
        self._spikes = LossSpikes(settings.loss_spike_deviations)
        self._since = time.perf_counter()
        self._moments: list[Moment] = []  # of the steps since the last log point
        self._unlogged: StepResult | None = None  # the last of them

    def on_start(self, trainer: Trainer) -> None:
        """Open the progress bar on rank 0."""
        self._since = time.perf_counter()
        self.progress.start()
        self._task = self.progress.add_task("training", total=trainer.total_steps, completed=trainer.step, status="")

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Add the step; on log points reduce (all ranks) and write (rank 0)."""
        if result.skipped:  # its losses would make the whole interval NaN
            self._say(trainer, "skipped_step", f"skipped step {trainer.step}: NaN or Inf, see {NONFINITE_FOLDER}/", {})
        else:
            self._meter.add(result.losses)
        self._moments.append(result.moment)
        self._unlogged = result
        if trainer.step % self.every_steps == 0 or trainer.step == trainer.total_steps:
            self._write(trainer, result)

    def on_end(self, trainer: Trainer) -> None:
        """Write the steps since the last log point, of a run that was told to stop; close the bar."""
        if self._unlogged is not None:
            self._write(trainer, self._unlogged)
        self.progress.stop()

    def _write(self, trainer: Trainer, result: StepResult) -> None:
        """Reduce the losses since the last log point (all ranks), write and show them (rank 0)."""
        moments, self._moments, self._unlogged = self._moments, [], None
        means = dict(zip(self.names, self._meter.read(), strict=True))  # waits for the device: once per log interval
        now = time.perf_counter()
        tokens_per_s = sum(moment.phase.tokens_per_step for moment in moments) / max(now - self._since, 1e-9)
        self._since = now
        self._report_spikes(trainer, means, moments)
        row: dict[str, float | str | None] = {
            "phase": result.moment.phase.name,
            "grad_norm": result.grad_norm,
            "learning_rate": result.moment.learning_rate,
            "tokens_per_s": tokens_per_s,
            "skipped_steps": trainer.skipped.count,
        }
        for name, mean in means.items():
            row |= {f"train/{name}/kl": mean.kl, f"train/{name}/cross_entropy": mean.cross_entropy}
        row |= self._router_values(trainer, result)
        self.log.write(trainer.step, row)
        shown = [
            f"{name} {mean.cross_entropy:.3f}" + (f" x{ratio:.2f}" if isinstance(ratio, float) else "")
            for name, mean in means.items()
            if mean.cross_entropy is not None
            for ratio in [row.get(f"router/{name}/cost_ratio")]
        ]
        status = "  ".join([*shown, f"{tokens_per_s:,.0f} tok/s"])
        phase = result.moment.phase.name
        self.progress.update(self._task, completed=trainer.step, description=phase, status=status)

    def _report_spikes(self, trainer: Trainer, means: Mapping[str, MeanLoss], moments: Sequence[Moment]) -> None:
        """Warn of losses that stand out, with the samples they were measured on."""
        last = moments[-1]
        first = next(moment for moment in moments if moment.phase_index == last.phase_index)
        samples = [first.consumed_samples, last.consumed_samples + last.phase.global_batch - 1]
        for name, mean in means.items():
            loss = mean.cross_entropy if mean.kl is None else mean.kl
            spike = None if loss is None else self._spikes.take(name, loss, last.phase_index)
            if spike is not None:
                values = {"phase": last.phase.name, "first_step": first.step + 1, "samples": samples, **asdict(spike)}
                text = f"{spike}; steps {first.step + 1} to {trainer.step}, samples {samples[0]} to {samples[1]}"
                self._say(trainer, "loss_spike", text, values)

    def _say(self, trainer: Trainer, kind: str, text: str, values: Mapping[str, Any]) -> None:
        self.log.event(kind, trainer.step, values)
        if trainer.world.is_main:
            self.progress.console.print(f"[yellow]{text}")

    def _router_values(self, trainer: Trainer, result: StepResult) -> dict[str, float]:
        chooser, moment = trainer.chooser, result.moment
        if chooser is None:
            return {}
        values = {
            "temperature": moment.temperature,
            "logit_scale": moment.logit_scale,
            "router_learning_rate": 0.0 if moment.elastic.router_frozen else moment.router_learning_rate,
        }
        subnets = trainer.chosen_subnets()
        for budget in chooser.budgets:
            used = subnet_cost(chooser.space.parent, subnets[budget.name], chooser.deployment)[budget.metric]
            values[f"router/{budget.name}/cost_ratio"] = float(used) / budget.limit
        if result.budget_losses is not None:
            for budget, loss in zip(chooser.budgets, result.budget_losses.tolist(), strict=True):
                values[f"router/{budget.name}/budget_loss"] = loss
        return values


@dataclass
class Validate(Callback):
    """Evaluates every budget's argmax subnet on the held-out split every n steps and at the end."""

    datasets: Sequence[HeldOut]
    log: RunLog
    every_steps: int
    num_sequences: int
    micro_batch_size: int

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when the step is due, at the sequence length of the phase that just ran."""
        if trainer.step % self.every_steps and trainer.step != trainer.total_steps:
            return
        subnets, bare = trainer.chosen_subnets(), trainer.chooser is None
        gates = {name: None if bare else Gates.slice(subnet) for name, subnet in subnets.items()}
        data = self.datasets[result.moment.phase_index]
        losses = evaluate_subnets(trainer.runner, gates, data, self.num_sequences, self.micro_batch_size)
        row = {f"validation/{name}/loss": loss.mean.cross_entropy for name, loss in losses.items()}
        for name, loss in losses.items():
            labels = source_labels(loss.by_source) if len(loss.by_source) > 1 else {}
            for source, label in labels.items():
                row[f"validation/{name}/loss/{label}"] = loss.by_source[source].cross_entropy
        self.log.write(trainer.step, row)
