"""The same launcher where there is no Slurm: torchrun on this machine, the signal of a cloud that takes it away."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.overrides import logged_steps, tiny_overrides

LAUNCHER = Path(__file__).parents[2] / "launch" / "elastic_12b.sh"
END_S = 480.0  # generous: a busy machine starts a rank in a minute


class Launched:
    """The launcher of the main job at work on two ranks of this machine."""

    def __init__(self, start: Path, folder: Path, *more: str) -> None:
        settings = {"PY": sys.executable, "GPUS_PER_NODE": "0", "PROCESSES_PER_NODE": "2", "PYTHONWARNINGS": "ignore"}
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | settings
        command = ["bash", str(LAUNCHER), *tiny_overrides(start, folder, "alone", (100_000, 1), *more)]
        self.run, self.output = folder / "run" / "alone", folder / "said"
        with self.output.open("w") as said:
            self.job = subprocess.Popen(command, env=variables, cwd=folder, stdout=said, stderr=subprocess.STDOUT)

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged a step."""
        deadline = time.monotonic() + END_S
        while max(logged_steps(self.run), default=0) < step:
            assert self.job.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)


@pytest.mark.slow  # in Slurm's place a stub shows the same way every time (test_launchers.py), and Slurm the ranks
@pytest.mark.timeout(600)
def test_two_ranks_train_until_the_signal_and_leave_a_checkpoint(start: Path, tmp_path: Path) -> None:
    launched = Launched(start, tmp_path)
    try:
        launched.wait_for_step(2)
        launched.job.send_signal(signal.SIGUSR1)
        assert launched.job.wait(END_S) == 75, launched.output.read_text()  # not finished: the same command goes on
    finally:
        launched.job.kill()
    steps = logged_steps(launched.run)
    assert [folder.name for folder in (launched.run / "checkpoints").iterdir()] == [f"step_{max(steps):08d}"]
    assert steps == list(range(1, max(steps) + 1))
    (logs,) = (tmp_path / "logs").iterdir()
    assert "4 MiB over 2 ranks" in (logs / "try_0" / "collective_0.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_hangs_ends_the_job_by_time_out(start: Path, tmp_path: Path) -> None:
    launched = Launched(start, tmp_path, "trainer.collective_timeout_s=60", "trainer.watchdog_timeout_s=15")
    try:
        launched.wait_for_step(2)
        os.kill(rank_process(tmp_path, 1), signal.SIGSTOP)
        assert launched.job.wait(END_S) not in (0, 75), launched.output.read_text()
    finally:
        launched.job.kill()
    named = launched.output.read_text().partition("the likeliest culprit first:")[2]
    assert re.match(r"\s+rank 0 on \S+, exit code 75: rank 1 gives no sign of life, last seen at step", named), named


def rank_process(folder: Path, rank: int) -> int:
    """Find the process of one rank of the run under `folder`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables, command = (entry / "environ").read_bytes().split(b"\0"), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables and str(folder).encode() in command:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")
