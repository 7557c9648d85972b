"""Nobody trains on without torchrun's agent: a worker that lost it is told to stop, whatever it is doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
WORKER = "import time; from elastic.world.agent import end_with_agent; end_with_agent(); print('up'); time.sleep(60)"
# The worker keeps this process's stdout, which so ends with the last of the two.
AGENT = "import subprocess, sys; subprocess.run([sys.executable, '-u', '-c', sys.argv[1]])"


@pytest.mark.parametrize("is_worker", [True, False])
def test_a_worker_ends_soon_after_its_agent_and_other_processes_do_not(is_worker: bool) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    variables |= {"PYTHONPATH": str(ROOT)} | ({"TORCHELASTIC_RUN_ID": "1"} if is_worker else {})
    with subprocess.Popen([sys.executable, "-c", AGENT, WORKER], env=variables, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None and agent.stdout.readline() == b"up\n"
        (worker,) = psutil.Process(agent.pid).children()
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        try:
            if is_worker:
                worker.wait(timeout=20)
            else:
                with pytest.raises(psutil.TimeoutExpired):
                    worker.wait(timeout=2)
        finally:
            if worker.is_running():
                worker.kill()
