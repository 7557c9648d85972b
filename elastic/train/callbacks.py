"""What happens around the steps of a run: validation. Saving is in save_checkpoints.py, signals in signals.py."""

from elastic.data.stream import HeldOut, source_labels
from elastic.space.gates import Gates
from elastic.train.evaluation import evaluate_subnets
from elastic.train.log import RunLog
from elastic.train.trainer import StepResult, Trainer


class NoCallback:
    """Does nothing; callbacks override what they need."""

    def on_start(self, trainer: Trainer) -> None: ...

    def after_step(self, trainer: Trainer, result: StepResult) -> None: ...

    def on_end(self, trainer: Trainer) -> None: ...


class Validate(NoCallback):
    """Evaluates every budget's argmax subnet on the held-out split every n steps and at the end."""

    def __init__(
        self, datasets: list[HeldOut], log: RunLog, *, every_steps: int, num_sequences: int, micro_batch_size: int
    ) -> None:
        self.datasets, self.log, self.every_steps = datasets, log, every_steps
        self.num_sequences, self.micro_batch_size = num_sequences, micro_batch_size

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when the step is due, at the sequence length of the phase that just ran."""
        if trainer.step % self.every_steps and trainer.step != trainer.total_steps:
            return
        subnets, bare = trainer.chosen_subnets(), trainer.chooser is None
        losses = evaluate_subnets(
            trainer.runner,
            {name: None if bare else Gates.slice(subnet) for name, subnet in subnets.items()},
            self.datasets[result.moment.phase_index],
            num_sequences=self.num_sequences,
            micro_batch_size=self.micro_batch_size,
            world=trainer.world,
        )
        values = {f"validation/{name}/loss": loss.mean.cross_entropy for name, loss in losses.items()}
        for name, loss in losses.items():
            if len(loss.by_source) > 1:
                labels = source_labels(loss.by_source)
                values |= {
                    f"validation/{name}/loss/{labels[source]}": mean.cross_entropy
                    for source, mean in loss.by_source.items()
                }
        self.log.write(trainer.step, {name: value for name, value in values.items() if value is not None})
