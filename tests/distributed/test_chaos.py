"""A run under torchrun, killed again and again: recipes/chaos.py, two kills here, fifty by hand."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes._chaos_report import ChaosError, differing, logged

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_killed_twice_a_run_under_torchrun_ends_with_the_same_bytes() -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "chaos.py"), "--kills=2", "--seed=3"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 kills in" in ended.stdout and len(re.findall(r"in all: equal", ended.stdout)) >= 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_fifty_times_with_commands_of_their_own() -> None:
    command = [sys.executable, str(ROOT / "recipes" / "chaos.py"), "--kills=50", "--fresh"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == 0


def write_run(folder: Path, losses: list[float], weights: bytes) -> Path:
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "__0_0.distcp").write_bytes(weights)
    (checkpoint / "router.safetensors").write_bytes(b"router")
    rows = [{"step": step, "loss": loss, "tokens_per_s": step * 7.0} for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_comparison_sees_one_bit_one_number_and_one_missing_file(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "reference", [1.0, 2.0], b"\x00\x01")
    assert differing(write_run(tmp_path / "same", [1.0, 2.0], b"\x00\x01"), reference) == []
    assert differing(write_run(tmp_path / "bit", [1.0, 2.0], b"\x00\x00"), reference) == ["step_00000002/__0_0.distcp"]
    assert differing(write_run(tmp_path / "loss", [1.0, 2.5], b"\x00\x01"), reference) == ["step 2"]
    shutil.copytree(reference, tmp_path / "less")
    (tmp_path / "less" / "checkpoints" / "step_00000002" / "router.safetensors").unlink()
    assert differing(tmp_path / "less", reference) == ["step_00000002/router.safetensors"]
    with (reference / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 2, "loss": 2.25}\n')
    with pytest.raises(ChaosError, match="step 2 ran twice with other numbers: loss"):
        logged(reference)
