"""The arguments that turn a launcher's run into one of seconds, and what such a run has logged."""

import json
from pathlib import Path


def tiny_overrides(start: Path, folder: Path, version: str, steps: tuple[int, int], *more: str) -> list[str]:
    """Return the run train_elastic with overrides for data and parent under `start`, written to folder/run/version.

    A later override of a group or a key in `more` takes the place of an earlier one.
    """
    curriculum = {
        "sequence_length": (32, 64),
        "global_batch": (8, 8),
        "steps": steps,
        "lr.warmup_steps": (0, 0),
        "router_lr.warmup_steps": (0, 0),
    }
    given = [
        "--config-name=train_elastic",  # the last one counts
        "budgets=smoke",
        *(f"curriculum.{phase}.{key}={values[phase]}" for key, values in curriculum.items() for phase in (0, 1)),
        f"data.path={start}/data",
        f"init_from.permuted_parent={start}/run/permuted",
        "data.micro_batch=1",
        "data.validation_sequences=4",
        "elastic.router.draws_per_step=2",
        "elastic.router.hidden_width=16",
        "trainer.log_every_n_steps=1",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run",
        f"exp_manager.version={version}",
        *more,
    ]
    return list({override.partition("=")[0]: override for override in given}.values())


def logged_steps(run: Path) -> list[int]:
    """List the training steps of metrics.jsonl in the order they were logged, as often as they were."""
    if not (run / "metrics.jsonl").exists():
        return []
    whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0]  # the last line may be half written
    logged = map(json.loads, whole.splitlines())
    return [row["step"] for row in logged if "tokens_per_s" in row]
