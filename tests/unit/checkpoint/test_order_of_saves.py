"""The order of saves that write in the background, with saves of which the test decides when they are written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import elastic.train.callbacks as saving
from elastic.checkpoint.write import SavedCheckpoint
from elastic.train.callbacks import SaveCheckpoints
from elastic.train.log import RunLog


class FakeSave:
    """A save of which the test decides when it is written."""

    def __init__(self, step: int, events: list[str]) -> None:
        self.step, self.events, self.written = step, events, False
        events.append(f"begin {step}")

    def is_written(self) -> bool:
        return self.written

    def finish(self) -> SavedCheckpoint:
        self.events.append(f"finish {self.step}")
        return SavedCheckpoint(Path(f"step_{self.step:08d}"), 10, 1.0, 0.5)


def test_two_saves_never_overlap_and_the_end_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    begun: list[FakeSave] = []

    def begin_save(folder: Path, *_args: Any, in_background: bool) -> FakeSave:
        assert in_background
        begun.append(FakeSave(int(folder.name[-8:]), events))
        return begun[-1]

    monkeypatch.setattr(saving, "begin_save", begin_save)
    monkeypatch.setattr(saving, "prune", lambda *_args: events.append("prune"))
    trainer: Any = SimpleNamespace(
        step=0, run_folder=tmp_path, trainable=str, record=None, training_state=str, carried_from=None,
        world=SimpleNamespace(is_main=True),
    )  # fmt: skip
    log = RunLog(tmp_path, tensorboard=False)
    saver = SaveCheckpoints(
        2, keep_last=1, milestone_steps=None, in_background=True, log=log, console=Console(quiet=True)
    )
    saver.on_start(trainer)

    def step() -> None:
        trainer.step += 1
        saver.after_step(trainer, None)  # type: ignore[arg-type]

    for _ in range(3):
        step()
    assert events == ["begin 2"]
    step()  # due, and the last one is not written yet: it is waited for
    assert events == ["begin 2", "finish 2", "prune", "begin 4"]
    begun[-1].written = True
    step()
    assert events[4:] == ["finish 4", "prune"]
    saver.on_end(trainer)
    assert events[6:] == ["begin 5", "finish 5", "prune"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5, 5]
    assert rows[0] | {"step": 0} == {
        "step": 0,
        "checkpoint/seconds": 1.0,
        "checkpoint/blocked_seconds": 0.5,
        "checkpoint/bytes": 10.0,
    }
