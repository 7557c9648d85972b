"""Every kernel compiles for the GPUs of the last three generations and keeps its numbers in registers."""

import json
import os
import subprocess
import sys
from collections import Counter


def test_kernels_compile_without_spilled_registers() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.programs.compile_ahead", "80", "90", "100"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert Counter(row["architecture"] for row in rows) == {80: 16, 90: 16, 100: 16}
    assert [row for row in rows if row["STACK"] or row["LOCAL"] or not row["REG"]] == []
