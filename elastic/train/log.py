"""Where numbers go: metrics.jsonl and TensorBoard always, W&B when configured."""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic.hf.safe_files import read_json
from elastic.run.folder import WANDB_FILE
from elastic.train.nonfinite import readable
from elastic.world.files import explained, write_json, written_aside

METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"


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
        for name in (METRICS_FILE, EVENTS_FILE):
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
