"""A recipe starts its own processes, and a user's mistake is all that is on the screen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes._start import split_processes

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("arguments", "processes", "rest"),
    [
        (["seed=1"], None, ["seed=1"]),
        (["--nproc-per-node=2", "seed=1"], "2", ["seed=1"]),
        (["-cn", "smoke_elastic", "--nproc_per_node", "gpu", "seed=1"], "gpu", ["-cn", "smoke_elastic", "seed=1"]),
    ],
)
def test_number_of_processes_is_told_apart_from_what_hydra_reads(
    arguments: list[str], processes: str | None, rest: list[str]
) -> None:
    assert split_processes(arguments) == (processes, rest)


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        environment.pop(name, None)
    command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_in_two_processes_a_mistake_is_said_once_and_nothing_else(tmp_path: Path) -> None:
    ended = started(tmp_path, "--nproc-per-node=2", "parallel.tensor=3", "data.path=d", "init_from.checkpoint=c")
    assert ended.returncode == 2 and ended.stdout == ""
    heading, *lines = ended.stderr.splitlines()
    assert heading == "3 problems in the configuration:" and len(lines) == 3, ended.stderr
    assert "must divide the number of processes = 2" in lines[0]


def test_a_mistake_found_in_the_files_comes_without_a_line_of_hydras(tmp_path: Path) -> None:
    """The body refuses what no check of the config can see: here a folder that is no model."""
    (tmp_path / "model").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "import_hf.py"), "source=model"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "model cannot be read as a nemotron_h model" in ended.stderr
    assert "Error executing job" not in ended.stderr and "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_start_is_free_of_other_packages_warnings_and_of_those_alone(tmp_path: Path) -> None:
    lines = [
        "import recipes._nemo, warnings",
        "from megatron.core.transformer import TransformerConfig",
        "import megatron.core.models.mimo.config.base_configs",
        "warnings.warn('The argument order of load has been changed. Please check the document')",
        "warnings.warn('torch.distributed is disabled, unavailable or uninitialized, assuming')",
        "TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)",
        "warnings.warn('something of our own')",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-c", "\n".join(lines)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout == ""
    said = [line for line in ended.stderr.splitlines() if "Warning" in line]
    assert len(said) == 1 and "something of our own" in said[0], ended.stderr
