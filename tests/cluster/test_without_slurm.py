"""The same launcher where there is no Slurm: torchrun on this machine, the signal of a cloud that takes it away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.overrides import logged_steps, tiny_overrides

LAUNCHER = Path(__file__).parents[2] / "launch" / "elastic_12b.sh"
END_S = 480.0  # generous: a busy machine starts a rank in a minute


@pytest.mark.timeout(600)
def test_two_ranks_train_until_the_signal_and_leave_a_checkpoint(start: Path, tmp_path: Path) -> None:
    settings = {"PY": sys.executable, "GPUS_PER_NODE": "0", "PROCESSES_PER_NODE": "2", "PYTHONWARNINGS": "ignore"}
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | settings
    run = tmp_path / "run" / "alone"
    command = ["bash", str(LAUNCHER), *tiny_overrides(start, tmp_path, "alone", (100_000, 1))]
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + END_S
        while max(logged_steps(run), default=0) < 2:
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(END_S) == 75, (tmp_path / "said").read_text()  # not finished: the same command goes on
    finally:
        job.kill()
    steps = logged_steps(run)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step_{max(steps):08d}"]
    assert steps == list(range(1, max(steps) + 1))
    (logs,) = (tmp_path / "logs").iterdir()
    assert "4 MiB over 2 ranks" in (logs / "try_0" / "collective_0.log").read_text()
