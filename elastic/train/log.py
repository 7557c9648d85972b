"""Where numbers go: metrics.jsonl and TensorBoard always, W&B when configured, a progress bar on the console."""

import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from elastic.config.sections import TrainerConfig
from elastic.hf.safe_files import read_json
from elastic.router.phases import Moment
from elastic.run.folder import WANDB_FILE
from elastic.space.shape import Subnet
from elastic.train.choices import off_budget, router_values
from elastic.train.evaluation import LossMeter, MeanLoss
from elastic.train.nonfinite import NONFINITE_FOLDER, readable
from elastic.train.trainer import Callback, StepResult, Trainer
from elastic.world.files import explained, write_json, written_aside
from elastic.world.groups import World

METRICS_FILE, EVENTS_FILE, CHOICES_FILE = "metrics.jsonl", "events.jsonl", "choices.jsonl"
WINDOW = 32  # log intervals a loss is compared with; ours
MIN_HISTORY = 10
NORMAL = 1.4826  # median absolute deviation to standard deviation, for normal noise
RELATIVE_FLOOR = 0.01  # of the median: a loss that hardly moves may move by that much; ours


def open_wandb(folder: Path, project: str, name: str, config: Mapping[str, Any]) -> Any:
    """Open the run at Weights & Biases; needs the wandb package (a rule of the config) and a login.

    The run's id is kept in its folder, so that a resumed run goes on as the same one. W&B itself keeps the first value
    of a step that is logged again after a kill.
    """
    import wandb

    path = folder / WANDB_FILE
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex})
    at = dict(project=project, name=name, dir=str(folder), **read_json(path, 1 << 10))
    return wandb.init(**at, config=dict(config), resume="allow")


class LogError(ValueError):
    """A log that cannot be written."""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say which log could not be written, and what helps."""
    try:
        yield
    except OSError as error:
        raise LogError(f"the log was not written: {explained(error, path)}") from error


class RunLog:
    """Appends rows of numbers to the run's files. On ranks other than 0 (`folder` None) it writes nothing.

    What a killed attempt logged after `step`, from which the run goes on, is dropped: those steps run again. `say`
    hears how much that is.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        tensorboard: bool,
        wandb_run: Any = None,
        step: int = 0,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._folder, self._wandb = folder, wandb_run
        self._tensorboard: Any = None
        if folder is None:
            return
        for name in (METRICS_FILE, EVENTS_FILE, CHOICES_FILE):
            with _explained(folder / name):
                if dropped := _drop_after(folder / name, step):
                    say(f"{name}: {dropped} lines of steps after {step} are dropped, for these steps run again")
        self._append(METRICS_FILE, ())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """Write one row: all but None to metrics.jsonl (NaN and Inf as text), finite numbers to TensorBoard and W&B."""
        found = {name: value for name, value in values.items() if value is not None}
        row = {name: value if isinstance(value, str) else readable(value) for name, value in found.items()}
        self._append(METRICS_FILE, [{"step": step, **row}])
        numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        for tag, value in numbers.items() if self._tensorboard is not None else ():
            self._tensorboard.add_scalar(tag, value, step)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append something out of the ordinary to events.jsonl."""
        self._append(EVENTS_FILE, [{"event": kind, "step": step, **values}])

    def num_events(self, kind: str) -> int:
        """Count what events.jsonl has of a kind, of earlier attempts at this run, too."""
        if self._folder is None or not (path := self._folder / EVENTS_FILE).is_file():
            return 0
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return sum(line.startswith(f'{{"event": "{kind}",') for line in lines)

    def choices(self, step: int, subnets: Mapping[str, Subnet]) -> None:
        """Append every budget's subnet, layer by layer, to choices.jsonl."""
        self._append(CHOICES_FILE, [{"step": step, "choices": {name: asdict(one) for name, one in subnets.items()}}])

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._folder is not None:
            with _explained(self._folder / name), (self._folder / name).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def close(self) -> None:
        """Flush and close what TensorBoard and W&B have open."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_after(path: Path, step: int) -> int:
    """Drop the lines of later steps, and one that a kill cut off; returns their number. Other text stays."""
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        with written_aside(path) as aside:
            aside.write_text("".join(kept), encoding="utf-8", errors="surrogateescape")
    return len(lines) - len(kept)


def _step_of(line: str) -> int:
    try:
        row = json.loads(line)
        return row["step"] if isinstance(row["step"], int) else 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0  # not a row of ours


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
        self,
        log: RunLog,
        budget_names: Sequence[str],
        settings: TrainerConfig,
        console: Console,
        world: World,
        sources: Sequence[str] = (),
        epochs: Callable[[int], Mapping[str, float]] = lambda step: {},
    ) -> None:
        """Take a blend's sources in the order of their numbers, and how often each has been read before a step."""
        self.log, self.names, self.every_steps = log, budget_names, settings.log_every_n_steps
        self.sources, self.epochs = sources, epochs
        bar = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        columns = ("[bold]{task.description}", *bar, "{task.fields[status]}")
        self.progress = Progress(*columns, console=console, disable=not world.is_main)
        self._meter = LossMeter(len(budget_names), world.device, len(sources))
        self._spikes = LossSpikes(settings.loss_spike_deviations)
        self._since, self._task = time.perf_counter(), TaskID(0)
        self._moments: list[Moment] = []  # of the steps since the last log point
        self._unlogged: StepResult | None = None  # the last of them
        self._first_step = 0  # a run that had ended says nothing again
        self._num_skipped = log.num_events("skipped_step")  # of earlier attempts

    def on_start(self, trainer: Trainer) -> None:
        """Open the progress bar on rank 0."""
        self._since, self._first_step = time.perf_counter(), trainer.step
        self.progress.start()
        self._task = self.progress.add_task("training", total=trainer.total_steps, completed=trainer.step, status="")

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Add the step; on log points reduce (all ranks) and write (rank 0)."""
        if result.skipped:  # its losses would make the whole interval NaN
            self._say(trainer, "skipped_step", f"skipped step {trainer.step}: NaN or Inf, see {NONFINITE_FOLDER}/", {})
            self._num_skipped += 1
        else:
            self._meter.add(result.losses)
        self._moments.append(result.moment)
        self._unlogged = result
        if trainer.step % self.every_steps == 0 or trainer.step == trainer.total_steps:
            self._write(trainer, result)

    def before_move(self, trainer: Trainer) -> None:
        """Keep what was added since the last log point."""
        self._meter.collect(trainer.world)

    def on_end(self, trainer: Trainer) -> None:
        """Write the steps since the last log point, of a run that was told to stop; close the bar."""
        if self._unlogged is not None:
            self._write(trainer, self._unlogged)
        if trainer.chooser is not None and trainer.step == trainer.total_steps > self._first_step:
            for kind, text, values in off_budget(trainer.chooser):
                self._say(trainer, kind, text, values)
        self.progress.stop()

    def _write(self, trainer: Trainer, result: StepResult) -> None:
        """Reduce the losses since the last log point (all ranks), write and show them (rank 0)."""
        moments, self._moments, self._unlogged = self._moments, [], None
        every = iter(self._meter.read(trainer.world))  # waits for the device: once per log interval
        means = {name: next(every) for name in self.names}
        now = time.perf_counter()
        tokens_per_s = sum(moment.phase.tokens_per_step for moment in moments) / max(now - self._since, 1e-9)
        self._since = now
        self._report_spikes(trainer, means, moments)
        row: dict[str, float | str | None] = {
            "phase": result.moment.phase.name,
            "grad_norm": float(result.grad_norm),
            "learning_rate": result.moment.learning_rate,
            "tokens_per_s": tokens_per_s,
            "skipped_steps": self._num_skipped,
            "counted_tokens": sum(mean.num_tokens for mean in means.values()),
            "fill": trainer.data.fill(result.moment),
        }
        for name, mean in means.items():
            row |= {f"train/{name}/kl": mean.kl, f"train/{name}/cross_entropy": mean.cross_entropy}
        for name in self.names:
            for source, mean in zip(self.sources, every, strict=False):
                row[f"train/{name}/kl/{source}"] = mean.kl
                row[f"train/{name}/cross_entropy/{source}"] = mean.cross_entropy
        row |= {f"epochs/{source}": count for source, count in self.epochs(trainer.step).items()}
        row |= router_values(trainer.chooser, result)
        self.log.write(trainer.step, row)
        shown = [
            f"{name} {mean.cross_entropy:.3f}" + (f" x{ratio:.2f}" if isinstance(ratio, float) else "")
            for name, mean in means.items()
            if mean.cross_entropy is not None
            for ratio in [row.get(f"router/{name}/cost_ratio")]
        ]
        status = "  ".join([*shown, f"{tokens_per_s:,.0f} tok/s"])
        self.progress.update(self._task, completed=trainer.step, description=result.moment.phase.name, status=status)

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
