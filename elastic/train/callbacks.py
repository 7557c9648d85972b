"""What happens around the steps of a run: checkpoints, validation. Stopping on a signal is in signals.py."""

import shutil

from elastic.train.checkpoint import checkpoint_folder, list_checkpoints, save_checkpoint
from elastic.train.chosen import chosen_gates
from elastic.train.data import PackedSequences
from elastic.train.evaluation import evaluate_subnets
from elastic.train.logging import RunLog
from elastic.train.trainer import StepResult, Trainer


class NoCallback:
    """Does nothing; callbacks override what they need."""

    def on_start(self, trainer: Trainer) -> None: ...

    def after_step(self, trainer: Trainer, result: StepResult) -> None: ...

    def on_end(self, trainer: Trainer) -> None: ...


class SaveCheckpoints(NoCallback):
    """Saves every n steps, at the end and before an orderly stop; keeps the newest few."""

    def __init__(self, every_steps: int, keep_last: int) -> None:
        self.every_steps, self.keep_last = every_steps, keep_last
        self.saved_step: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Remember where the run resumed: that checkpoint is there already."""
        self.saved_step = trainer.step or None

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save when the step is due."""
        if trainer.step % self.every_steps == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the last step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self.saved_step == trainer.step:
            return
        folder = checkpoint_folder(trainer.run_folder, trainer.step)
        state = trainer.training_state()
        save_checkpoint(folder, trainer.trainable(), trainer.record, state, trainer.world, trainer.carried_from)
        self.saved_step = trainer.step
        if trainer.world.is_main:
            for old in list_checkpoints(trainer.run_folder)[: -self.keep_last]:
                shutil.rmtree(old)


class Validate(NoCallback):
    """Evaluates every budget's argmax subnet on the held-out split every n steps and at the end."""

    def __init__(
        self, datasets: list[PackedSequences], log: RunLog, *, every_steps: int, num_sequences: int, micro_batch: int
    ) -> None:
        self.datasets, self.log, self.every_steps = datasets, log, every_steps
        self.num_sequences, self.micro_batch = num_sequences, micro_batch

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when the step is due, at the sequence length of the phase that just ran."""
        if trainer.step % self.every_steps and trainer.step != trainer.total_steps:
            return
        losses = evaluate_subnets(
            trainer.runner,
            chosen_gates(trainer),
            self.datasets[result.place.phase_index],
            num_sequences=self.num_sequences,
            micro_batch=self.micro_batch,
            world=trainer.world,
        )
        values = {f"validation/{name}/loss": loss.cross_entropy for name, loss in losses.items()}
        self.log.write(trainer.step, {name: value for name, value in values.items() if value is not None})
