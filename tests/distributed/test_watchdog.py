"""A rank that is killed, stopped or stuck: the others end in time, name rank and step, and nothing stays behind."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed import distributed_c10d

from elastic.config.load import load
from elastic.config.verbs import ElasticConfig
from elastic.train.pipeline import PipelineRunner
from elastic.train.trainer import Callback
from elastic.verbs.training import run_training
from elastic.world.groups import Layout, join_world, world
from elastic.world.watchdog import EXIT_STALLED, Progress, Sign, Watchdog, verdict
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.torchrun import Torchrun
from tests.distributed.training import elastic_values

NAMED = "rank 1 gives no sign of life, last seen at step 3, forward and backward"


def last_sign(rank):
    """Return the last sign of life of a rank, from the store."""
    return Sign(*json.loads(distributed_c10d._get_default_store().get(f"watchdog/{rank}")))


class RunnerThatEnds(PipelineRunner):
    """Sends its own process a signal in the middle of the third step's forward and backward."""

    def __init__(self, trainer, number):
        healthy = trainer.runner
        super().__init__(healthy.world, healthy.student, healthy.loss, healthy.teacher)
        self.trainer, self.number = trainer, number

    def forward_backward(self, micro_batches, **how):
        if self.trainer.step == 2:
            super().forward_backward(micro_batches[:1], **how)
            while last_sign(1)[2:] != (3, "forward and backward"):  # the others know it by where it ends
                time.sleep(0.01)
            os.kill(os.getpid(), self.number)
        return super().forward_backward(micro_batches, **how)


class EndRankOne(Callback):
    """Gives rank 1 that runner."""

    def __init__(self, number):
        self.number = number

    def on_start(self, trainer):
        if torch.distributed.get_rank() == 1:
            trainer.runner = RunnerThatEnds(trainer, self.number)


def killed(values):
    run_training(load(ElasticConfig, values), Console(quiet=True), [EndRankOne(signal.SIGKILL)])


def stopped(values):
    run_training(load(ElasticConfig, values), Console(quiet=True), [EndRankOne(signal.SIGSTOP)])


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Run both at once where it costs nothing: torchrun gives a stopped process 30 s to heed SIGTERM."""
    folder = tmp_path_factory.mktemp("runs")
    timeouts = dict(watchdog_timeout_s=12, collective_timeout_s=60, checkpoint_every_n_steps=100)
    with contextlib.ExitStack() as stack:

        def begin(main):
            # A folder of their own: a finished run of that name beside the parent would be gone on from, to code 0.
            values = elastic_values(start, main.__name__, trainer=timeouts, exp_manager=dict(exp_dir=str(folder)))
            return stack.enter_context(Torchrun(values, folder / f"{main.__name__}.log", main))

        first = begin(stopped)
        first.wait_until(lambda: "SIGTERM" in first.output)
        second = begin(killed)
        yield {run: (run.end(), run.left()) for run in (second, first)}


def test_nothing_is_left_of_a_run_whose_rank_was_killed_or_stopped(runs):
    for run, (code, left) in runs.items():
        assert code not in (0, None) and left == [], run.output


def test_the_other_rank_names_the_killed_one_and_its_step(runs):
    run, _ = runs
    assert re.search(rf"watchdog: rank 0 on \S+ failed in step 3, .*: {NAMED}", run.output), run.output


def test_the_other_rank_ends_in_time_and_names_the_stopped_one_and_its_step(runs):
    _, run = runs
    assert re.search(r"watchdog: rank 0 on \S+ has made no progress for 12 s: step 3, ", run.output), run.output
    assert re.search(rf"watchdog: rank 0 on \S+: {NAMED}", run.output), run.output
    assert re.search(rf"exitcode\s*: {EXIT_STALLED}", run.output), run.output
    report = (run.run_folder / "watchdog" / "rank_0.txt").read_text()
    assert "rank 0 on" in report and NAMED in report and "train_step" in report, "with the stacks of all threads"


STUCK_S = 6.0  # signs of life 0.3 s apart: a verdict looks at 1.5 s, in which also a busy machine runs every rank


def stuck(folder):
    progress = Progress()
    with Watchdog(progress, Path(folder), STUCK_S):
        progress.enter(7, "data and gates")
        if torch.distributed.get_rank() == 1:
            time.sleep(600)
        while True:
            # Rank 0 goes on and shows signs of life from further on.
            progress.enter(8, "optimizer")
            time.sleep(0.02)


def test_a_rank_that_is_stuck_alone_shows_where_and_ends(tmp_path):
    with pytest.raises(DistributedRunError) as caught:
        run_distributed(stuck, 2, str(tmp_path))
    assert f"rank 1, exit code {EXIT_STALLED}" in str(caught.value)
    report = (tmp_path / "watchdog" / "rank_1.txt").read_text()
    assert "has made no progress for 6 s: step 7, data and gates" in report
    assert "rank 1 is behind the others, at step 7, data and gates" in report
    assert re.search(r'test_watchdog.py", line \d+ in stuck', report)
    assert not (tmp_path / "watchdog" / "rank_0.txt").exists()


class WatchdogSeenLooking(Watchdog):
    """The main thread moves on while the watchdog looks around, however late it is woken."""

    def _verdict(self):
        found = super()._verdict()
        self.progress.enter(2, "data and gates")
        return found


def slow(folder):
    """One thing takes longer than it may, but ends while the watchdog still looks around."""
    progress = Progress()
    with WatchdogSeenLooking(progress, Path(folder), 2.0) as watchdog:
        progress.enter(1, "SaveCheckpoints.after_step")
        while progress.mark[1] == 1:
            time.sleep(0.01)
        beat = watchdog._beat
        while watchdog._beat < beat + 10:
            progress.enter(3, "forward and backward")
            time.sleep(0.01)
        return watchdog.progress.mark[1]


def test_a_rank_that_moves_on_after_all_is_left_alive(tmp_path):
    assert run_distributed(slow, 2, str(tmp_path)) == [3, 3]
    assert not (tmp_path / "watchdog").exists()


def sign(begun, step, doing="forward and backward", beat=1):
    return Sign(beat, begun, step, doing)


def later(signs):
    return [Sign(s.beat + 5, s.begun, s.step, s.doing) for s in signs]


def test_verdicts():
    same = [sign(30, 5), sign(30, 5), sign(30, 5)]
    assert (
        verdict(same, later(same)) == "all 3 ranks are alive and stand at the same point, step 5, forward and backward"
    )
    silent = later(same)
    silent[1] = same[1]
    assert verdict(same, silent) == "rank 1 gives no sign of life, last seen at step 5, forward and backward"
    assert verdict([None, *same], [None, *later(same)]) == "rank 0 gives no sign of life, last seen at its start"
    behind = [sign(30, 5), sign(28, 5, "data and gates"), sign(30, 5)]
    assert verdict(behind, later(behind)) == "rank 1 is behind the others, at step 5, data and gates"
    failed = [sign(30, 5), sign(30, 5, "failed: DataError"), sign(30, 5)]
    assert verdict(failed, later(failed)) == "rank 1 failed: DataError in step 5"
    many = [sign(30, 5)] * 20
    assert verdict(many, [*many[:19], *later(many[19:])]).endswith("; and 11 more ranks")


def test_the_thread_ends_with_the_block_and_slow_work_that_goes_on_is_left_alone(tmp_path):
    progress = Progress()
    with world(Layout()), Watchdog(progress, tmp_path, 2.0) as watchdog:
        while watchdog._beat * watchdog.beat_s < 1.2 * watchdog.timeout_s:  # longer than one thing may take
            progress.enter(1, "optimizer")
            time.sleep(0.01)
        assert "watchdog" in [thread.name for thread in threading.enumerate()]
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    assert list(tmp_path.iterdir()) == []


def test_every_group_takes_the_time_out():
    with world(Layout(), 77.0):
        found = {
            group.group_desc: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            for group in distributed_c10d._world.pg_map
        }
    # Megatron-Core forgets it for one group of experts, which this model does not have.
    assert found.pop("EXPERT_DATA_PARALLEL_GROUP_GLOO") == 1800.0
    assert len(found) > 10 and set(found.values()) == {77.0}


def wait_in_vain(kind):
    here = join_world(Layout(tensor=2) if kind == "tp" else Layout(), torch.device("cpu"), 2.0)
    if torch.distributed.get_rank() == 1:
        time.sleep(600)
    group = here.groups.tp if kind == "tp" else here.groups.dp_cp
    torch.distributed.all_reduce(torch.zeros(3), group=group)


@pytest.mark.parametrize("kind", ["tp", "dp"])
def test_a_collective_without_its_partner_ends_in_an_error(kind):
    with pytest.raises(DistributedRunError, match=r"(?i)timed out") as caught:
        run_distributed(wait_in_vain, 2, kind)
    assert isinstance(caught.value.__cause__, RuntimeError)
