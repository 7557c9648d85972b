"""Every kernel compiles for the GPUs of the last three generations and keeps its numbers in registers."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_without_spilled_registers(architecture: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.programs.compile_ahead", str(architecture)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) == 16
    assert [row for row in rows if row["STACK"] or row["LOCAL"] or not row["REG"]] == []
