"""Signals to real processes: an orderly stop of all ranks with a checkpoint, whenever they come; at once the second."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from rich.console import Console

from elastic.checkpoint.find import list_checkpoints
from elastic.config.load import load
from elastic.config.verbs import ElasticConfig
from elastic.train import callbacks
from elastic.train.evaluation import evaluate_subnets
from elastic.train.signals import SAME_SIGNAL_S, STOP_FILE_VARIABLE
from elastic.train.trainer import Callback
from elastic.verbs.training import run_training
from recipes._tiny_family import train_tiny_family
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.torchrun import Torchrun
from tests.distributed.training import CURRICULUM, elastic_values, rows

ROOT = Path(__file__).parents[2]


def run(values, *more):
    run_training(load(ElasticConfig, values), Console(quiet=True), more)


def signal_in_a_save(values, folder):
    def watch():
        while not list((folder / "checkpoints").glob("*.writing")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    run(values)


def signal_in_a_validation(values, folder):
    def evaluate(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_subnets(*arguments, **named)

    with mock.patch.object(callbacks, "evaluate_subnets", evaluate):
        run(values)


@pytest.mark.parametrize("when", [signal_in_a_save, signal_in_a_validation])
def test_what_is_under_way_is_finished_then_the_run_stops_in_order(start, when):
    values = elastic_values(start, when.__name__, trainer=dict(val_check_interval=3))
    folder = start / "run" / when.__name__
    run_distributed(when, 1, values, folder)  # returns: no error, exit code 0
    assert max(rows(start, when.__name__)) == 3
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000003"]
    assert not list((folder / "checkpoints").glob("*.writing")) and not (folder / "finished.json").exists()


class AtStart(Callback):
    """Signals this process while it starts, before the handlers are there."""

    def on_start(self, trainer):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_came_while_the_run_loaded_stops_it_after_a_step(start, tmp_path):
    (tmp_path / "stop").touch()  # by launch/common.sh, whose ranks ignore the signal itself until they listen
    values = elastic_values(start, "told_early")
    run_distributed(run, 1, values, env={STOP_FILE_VARIABLE: str(tmp_path / "stop")})
    assert list(rows(start, "told_early")) == [1]
    assert_stopped_with_a_checkpoint(start / "run" / "told_early")


class LeaveFile(Callback):
    """Does what launch/common.sh does when its time is nearly over, but for the signal."""

    def after_step(self, trainer, result):
        if trainer.step == 2 and trainer.world.is_main:
            Path(os.environ[STOP_FILE_VARIABLE]).touch()


def train_until_the_file(values):
    run_training(load(ElasticConfig, values), Console(quiet=True), [LeaveFile()])


def test_the_file_alone_stops_all_ranks(start, tmp_path):
    """Under proctrack/cgroup Slurm signals a step's own processes, torchrun, and none of its children."""
    values = elastic_values(start, "told_by_file")
    run_distributed(train_until_the_file, 2, values, env={STOP_FILE_VARIABLE: str(tmp_path / "stop")})
    assert list(rows(start, "told_by_file")) == [1, 2]
    assert_stopped_with_a_checkpoint(start / "run" / "told_by_file")


class SignalOnceMore(Callback):
    """Passes on, during the first step, the signal that the file already stands for."""

    def after_step(self, trainer, result):
        os.kill(os.getpid(), signal.SIGUSR1)


def train_and_hear_it_too(values):
    run(values, SignalOnceMore())


def test_the_file_and_the_signal_it_stands_for_are_one(start, tmp_path):
    (tmp_path / "stop").touch()
    values = elastic_values(start, "told_twice")
    run_distributed(train_and_hear_it_too, 1, values, env={STOP_FILE_VARIABLE: str(tmp_path / "stop")})
    assert list(rows(start, "told_twice")) == [1]
    assert_stopped_with_a_checkpoint(start / "run" / "told_twice")


def signal_at_start(values):
    run(values, AtStart())


def test_before_training_starts_a_signal_takes_its_default_course(start):
    with pytest.raises(DistributedRunError, match=f"exit code -{int(signal.SIGTERM)}"):
        run_distributed(signal_at_start, 1, elastic_values(start, "at_start"))


class Hang(Callback):
    """Stops rank 1 for good after the second step; rank 0 so waits in a collective, and is told twice to stop."""

    def after_step(self, trainer, result):
        if trainer.step != 2:
            return
        if not trainer.world.is_main:
            os.kill(os.getpid(), signal.SIGSTOP)

        def tell():
            for wait_s in (1.0, 0.1, SAME_SIGNAL_S):
                time.sleep(wait_s)
                os.kill(os.getpid(), signal.SIGUSR1)
                Path(trainer.run_folder, f"told_{time.monotonic_ns()}").touch()

        threading.Thread(target=tell, daemon=True).start()


def train_and_hang(values):
    run(values, Hang())


def test_a_second_signal_ends_a_rank_at_once_even_inside_a_collective(start):
    with pytest.raises(DistributedRunError, match=f"rank 0, exit code {128 + signal.SIGUSR1}"):
        run_distributed(train_and_hang, 2, elastic_values(start, "hanging"))
    # Two signals a moment apart were one: the process was still there to send, and mark, both.
    assert len(list((start / "run" / "hanging").glob("told_*"))) >= 2


@pytest.fixture
def torchrun(start, tmp_path, monkeypatch):
    """Start two workers, from the tests' server or as a user would; give them once two steps are done."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with contextlib.ExitStack() as runs:

        def launch(version, main=train_tiny_family):
            phases = [{**phase, "steps": 500} for phase in CURRICULUM]
            values = elastic_values(start, version, trainer=dict(checkpoint_every_n_steps=100), curriculum=phases[:1])
            run = runs.enter_context(Torchrun(values, tmp_path / f"{version}.log", main))
            run.wait_for_step(2)
            assert len(run.workers) == 2
            return run

        yield launch


def assert_stopped_with_a_checkpoint(folder):
    (checkpoint,) = list_checkpoints(folder)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert checkpoint.name == f"step_{max(steps):08d}" and max(steps) < 500
    assert not (folder / "finished.json").exists()


def test_one_signalled_worker_stops_both_and_torchrun_leaves_with_0(torchrun):
    run = torchrun("one_worker")
    run.workers[1].send_signal(signal.SIGUSR1)
    assert run.end() == 0, run.output
    assert_stopped_with_a_checkpoint(run.run_folder)


def test_sigterm_to_agent_and_workers_alike_is_one_signal_and_saves(torchrun):
    """As Slurm does at a time limit: the agent hands its own on, so that each worker gets two."""
    run = torchrun("everybody")
    workers = run.workers
    for process in (run.agent, *workers):
        process.send_signal(signal.SIGTERM)
    assert run.end() not in (0, None), run.output  # torchrun's own answer to SIGTERM
    psutil.wait_procs(workers, timeout=60)
    assert run.left() == []
    assert_stopped_with_a_checkpoint(run.run_folder)


def test_workers_whose_agent_is_killed_stop_in_order(torchrun):
    run = torchrun("orphans", main=None)
    workers = run.workers
    run.agent.kill()
    psutil.wait_procs(workers, timeout=60)
    assert run.left() == []
    assert_stopped_with_a_checkpoint(run.run_folder)
