"""Where numbers go: metrics.jsonl and TensorBoard always, W&B when configured, a progress bar on the console."""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from elastic.hf.safe_files import read_json
from elastic.router.phases import Moment
from elastic.run.folder import WANDB_FILE
from elastic.space.cost import subnet_cost
from elastic.train.metrics import LossMeter, MeanLoss
from elastic.train.nonfinite import NONFINITE_FOLDER, readable
from elastic.train.spikes import LossSpikes
from elastic.train.trainer import StepResult, Trainer
from elastic.world.files import explained, write_json, written_aside

METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"


class ScalarWriter(Protocol):
    """The part of a TensorBoard writer or W&B run that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


class WandbWriter:
    """Weights & Biases behind the same two calls; needs the wandb package (a rule of the config) and a login.

    The run's id is kept in its folder, so that a resumed run goes on as the same one. W&B itself keeps the first value
    of a step that is logged again after a kill.
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        path = folder / WANDB_FILE
        if not path.exists():
            write_json(path, {"id": uuid.uuid4().hex})
        self._run = wandb.init(
            project=project, name=name, dir=str(folder), config=dict(config), resume="allow", **read_json(path, 1 << 10)
        )

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Log one value."""
        self._run.log({tag: value}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


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
        extra: tuple[ScalarWriter, ...] = (),
        step: int = 0,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._writers: list[ScalarWriter] = list(extra)
        self._rows = None
        self._events = None if folder is None else folder / EVENTS_FILE
        if folder is None:
            return
        for name in (METRICS_FILE, EVENTS_FILE):
            with _explained(folder / name):
                if dropped := _drop_after(folder / name, step):
                    say(f"{name}: {dropped} lines of steps after {step} are dropped, for these steps run again")
        with _explained(folder / METRICS_FILE):
            self._rows = (folder / METRICS_FILE).open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write one row: all values to metrics.jsonl (NaN and Inf as text), finite numbers to the scalar writers."""
        if self._rows is None:
            return
        row = {name: value if isinstance(value, str) else readable(value) for name, value in values.items()}
        with _explained(Path(self._rows.name)):
            self._rows.write(json.dumps({"step": step, **row}) + "\n")
        for tag, value in values.items():
            if not isinstance(value, str) and math.isfinite(value):
                for writer in self._writers:
                    writer.add_scalar(tag, value, step)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append something out of the ordinary to events.jsonl."""
        if self._events is not None:
            with _explained(self._events), self._events.open("a") as file:
                file.write(json.dumps({"event": kind, "step": step, **values}) + "\n")

    def close(self) -> None:
        """Flush and close all files."""
        if self._rows is not None:
            self._rows.close()
        for writer in self._writers:
            writer.close()


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


class LogSteps:
    """Reduces the losses every n steps, writes them and shows them: loss per budget, cost ratio, tokens/s, ETA."""

    def __init__(
        self,
        log: RunLog,
        budget_names: tuple[str, ...],
        every_steps: int,
        console: Console,
        spikes: LossSpikes | None = None,
    ) -> None:
        self.log, self.names, self.every_steps, self.spikes = log, budget_names, every_steps, spikes
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self.progress = Progress(*columns, console=console)
        self._task: TaskID | None = None
        self._meter: LossMeter | None = None
        self._tokens, self._since = 0, time.perf_counter()
        self._moments: list[Moment] = []  # of the steps since the last log point
        self._unlogged: StepResult | None = None  # the last of them

    def on_start(self, trainer: Trainer) -> None:
        """Open the progress bar on rank 0."""
        self._meter = LossMeter(max(1, len(self.names)), trainer.world)
        self._since = time.perf_counter()
        if trainer.world.is_main:
            self.progress.start()
            self._task = self.progress.add_task(
                "training", total=trainer.total_steps, completed=trainer.step, status=""
            )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Add the step; on log points reduce (all ranks) and write (rank 0)."""
        assert self._meter is not None
        if result.skipped:  # its losses would make the whole interval NaN
            self._say(trainer, "skipped_step", f"skipped step {trainer.step}: NaN or Inf, see {NONFINITE_FOLDER}/", {})
        else:
            self._meter.add(result.losses)
        self._moments.append(result.moment)
        self._tokens += result.num_tokens
        self._unlogged = result
        if trainer.step % self.every_steps == 0 or trainer.step == trainer.total_steps:
            self._write(trainer, result)

    def on_end(self, trainer: Trainer) -> None:
        """Write the steps since the last log point, of a run that was told to stop; close the bar."""
        if self._unlogged is not None:
            self._write(trainer, self._unlogged)
        if self._task is not None:
            self.progress.stop()

    def _write(self, trainer: Trainer, result: StepResult) -> None:
        """Reduce the losses since the last log point (all ranks), write and show them (rank 0)."""
        assert self._meter is not None
        self._unlogged = None
        means = self._meter.read()  # waits for the device: once per log interval
        now = time.perf_counter()
        tokens_per_s = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        row: dict[str, float | str] = {
            "phase": result.moment.phase.name,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_s": tokens_per_s,
            "skipped_steps": trainer.skipped.count,
        }
        self._report_spikes(trainer, means)
        row |= self._loss_values(means) | self._router_values(trainer, result)
        self.log.write(trainer.step, row)
        if self._task is not None:
            self.progress.update(
                self._task,
                completed=trainer.step,
                description=result.moment.phase.name,
                status=self._status(means, row, tokens_per_s),
            )

    def _report_spikes(self, trainer: Trainer, means: list[MeanLoss]) -> None:
        """Warn of losses that stand out, with the samples they were measured on."""
        moments, self._moments = self._moments, []
        if self.spikes is None:
            return
        last = moments[-1]
        first = next(moment for moment in moments if moment.phase_index == last.phase_index)
        samples = [first.consumed_samples, last.consumed_samples + last.phase.global_batch - 1]
        for name, mean in zip(self.names, means, strict=True):
            loss = mean.cross_entropy if mean.kl is None else mean.kl
            spike = None if loss is None else self.spikes.take(name, loss, last.phase_index)
            if spike is not None:
                values = {"phase": last.phase.name, "first_step": first.step + 1, "samples": samples, **asdict(spike)}
                text = f"{spike}; steps {first.step + 1} to {trainer.step}, samples {samples[0]} to {samples[1]}"
                self._say(trainer, "loss_spike", text, values)

    def _say(self, trainer: Trainer, kind: str, text: str, values: Mapping[str, Any]) -> None:
        self.log.event(kind, trainer.step, values)
        if trainer.world.is_main:
            self.progress.console.print(f"[yellow]{text}")

    def _loss_values(self, means: list[MeanLoss]) -> dict[str, float]:
        values = {}
        for name, mean in zip(self.names, means, strict=True):
            if mean.num_tokens:
                values[f"train/{name}/kl"] = mean.kl
                values[f"train/{name}/cross_entropy"] = mean.cross_entropy
        return {name: value for name, value in values.items() if value is not None}

    def _router_values(self, trainer: Trainer, result: StepResult) -> dict[str, float]:
        chooser = trainer.chooser
        if chooser is None:
            return {}
        values = {
            "temperature": result.moment.temperature,
            "logit_scale": result.moment.logit_scale,
            "router_learning_rate": result.router_learning_rate or 0.0,
        }
        subnets = trainer.chosen_subnets()
        for budget in chooser.budgets:
            used = subnet_cost(chooser.space.parent, subnets[budget.name], chooser.deployment)[budget.metric]
            values[f"router/{budget.name}/cost_ratio"] = float(used) / budget.limit
        if result.budget_losses is not None:
            for budget, loss in zip(chooser.budgets, result.budget_losses.tolist(), strict=True):
                values[f"router/{budget.name}/budget_loss"] = loss
        return values

    def _status(self, means: list[MeanLoss], row: Mapping[str, float | str], tokens_per_s: float) -> str:
        parts = []
        for name, mean in zip(self.names, means, strict=True):
            if mean.cross_entropy is not None:
                ratio = row.get(f"router/{name}/cost_ratio")
                cost = f" x{ratio:.2f}" if isinstance(ratio, float) else ""
                parts.append(f"{name} {mean.cross_entropy:.3f}{cost}")
        return "  ".join([*parts, f"{tokens_per_s:,.0f} tok/s"])
