"""What happens around the steps of a run: validation, checkpoints. Numbers are in log.py, signals in signals.py."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from elastic.checkpoint.contents import damages, step_of
from elastic.checkpoint.find import checkpoint_folder, list_checkpoints
from elastic.checkpoint.state import begin_save
from elastic.checkpoint.write import CheckpointWrite
from elastic.data.held_out import HeldOut, source_labels
from elastic.space.gates import Gates
from elastic.train.evaluation import evaluate_subnets
from elastic.train.log import RunLog
from elastic.train.trainer import Callback, StepResult, Trainer

REMOVING = ".removing"


@dataclass
class Validate(Callback):
    """Evaluates every budget's subnet on the held-out split every n steps and at the end; logs the subnets, too."""

    datasets: Sequence[HeldOut]
    log: RunLog
    every_steps: int
    num_sequences: int

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when the step is due, at the sequence length of the phase that just ran."""
        if trainer.step % self.every_steps and trainer.step != trainer.total_steps:
            return
        subnets, bare = trainer.chosen_subnets(), trainer.chooser is None
        gates = {name: None if bare else Gates.slice(subnet) for name, subnet in subnets.items()}
        data = self.datasets[result.moment.phase_index]
        size = trainer.data.micro_batch_size
        losses = evaluate_subnets(trainer.runner, gates, data, self.num_sequences, size)
        row: dict[str, float | None] = {f"validation/{name}/loss": v.mean.cross_entropy for name, v in losses.items()}
        row["validation/counted_tokens"] = next(iter(losses.values())).mean.num_tokens  # the same for every choice
        for name, loss in losses.items():
            labels = source_labels(loss.by_source) if len(loss.by_source) > 1 else {}
            for source, label in labels.items():
                row[f"validation/{name}/loss/{label}"] = loss.by_source[source].cross_entropy
        self.log.write(trainer.step, row)
        if not bare:
            self.log.choices(trainer.step, subnets)


@dataclass
class SaveCheckpoints(Callback):
    """Saves every n steps, where the layout changes, at the end and before an orderly stop.

    Keeps the newest few and the milestones.

    With `in_background` a save is finished at the first step boundary at which every rank has written, a save that is
    due earlier waits for it, and so does the end of the run: two never overlap. A save that failed ends the run with
    CheckpointError, at the boundary, and leaves the checkpoints before it.
    """

    every_steps: int
    keep_last: int
    milestone_steps: int | None
    in_background: bool
    log: RunLog
    console: Console
    saved_step: int | None = None
    running: CheckpointWrite | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Remember where the run resumed: that checkpoint is there already."""
        self.saved_step = trainer.step or None

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Finish a save that everybody has written; start one when the step is due."""
        if self.running is not None and self.running.is_written():
            self._finish(trainer)
        if trainer.step % self.every_steps == 0:
            self._save(trainer)

    def before_move(self, trainer: Trainer) -> None:
        """Save what the next layout goes on from, and wait for it."""
        self._save(trainer)
        self._finish(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the last step, and wait for it."""
        self._save(trainer)
        self._finish(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self.saved_step == trainer.step:
            return
        self.saved_step = trainer.step
        self._finish(trainer)
        self.running = begin_save(
            checkpoint_folder(trainer.run_folder, trainer.step),
            trainer.trainable(),
            trainer.record,
            trainer.training_state(),
            trainer.world,
            trainer.carried_from,
            in_background=self.in_background,
        )
        if not self.in_background:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if self.running is None:
            return
        saved, self.running = self.running.finish(), None
        if not trainer.world.is_main:
            return
        seconds = {"checkpoint/seconds": saved.seconds, "checkpoint/blocked_seconds": saved.blocked_seconds}
        # At the step at which it was finished: loggers want steps to go forward.
        self.log.write(trainer.step, seconds | {"checkpoint/bytes": float(saved.size_bytes)})
        waited = f", training waited {saved.blocked_seconds:.1f} s" if self.in_background else ""
        text = f"saved {saved.folder.name}: {saved.size_bytes / 1e9:,.3f} GB in {saved.seconds:.1f} s{waited}"
        self.console.print(text, highlight=False)
        prune(trainer.run_folder, saved.folder, self.keep_last, self.milestone_steps, self.console.print)


def prune(
    run_folder: Path, newest: Path, keep_last: int, milestone_steps: int | None, say: Callable[[str], object]
) -> None:
    """Remove old whole checkpoints: all but the newest `keep_last` and every one of a multiple of `milestone_steps`.

    Nothing is removed unless `newest`, just written, is whole. Damaged ones do not count and stay, for a look at them.
    What cannot be removed is said and left for the next time.
    """
    whole = [folder for folder in list_checkpoints(run_folder) if not damages(folder, full=False)]
    if newest not in whole:
        say(f"{newest} is not whole right after it was written; older checkpoints stay")
        return
    milestones = {folder for folder in whole if milestone_steps and step_of(folder) % milestone_steps == 0}
    for old in whole[:-keep_last]:
        if old not in milestones and old != newest:
            with _said(say):  # renamed first: killed half-way, what is left does not look like a checkpoint
                old.rename(old.with_name(old.name + REMOVING))
    for left in newest.parent.glob(f"step_*{REMOVING}"):
        with _said(say):
            shutil.rmtree(left)


@contextmanager
def _said(say: Callable[[str], object]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        say(f"an old checkpoint was not removed: {error}")
