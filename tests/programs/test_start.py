"""Recipes as a user starts them: what is on the screen, the exit code, and the files that are left."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recipes._start import split_processes

ROOT = Path(__file__).parents[2]
BEHIND_COST = "behind cost"


def started(folder: Path, *arguments: str, root: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the Python of the project in `root` on `arguments` (a recipe's name, or Python's own) in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "TORCHDYNAMO_DISABLE": "1"}
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "COLUMNS", "SLURM_NODEID", "NODE_RANK"):
        environment.pop(name, None)
    program, *rest = arguments
    own = [program] if program.startswith("-") else [str(root / "recipes" / f"{program}.py")]
    return subprocess.run(
        [sys.executable, *own, *rest], cwd=folder, env=environment | more, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip


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


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Start a verb, let packages warn, check a run, start a verb on a wrong folder: in one process, made once."""
    folder = tmp_path_factory.mktemp("one_process")
    (folder / "model").mkdir()
    wrong = ["--processes=3", "train_elastic", "--config-name=elastic_12b", "data.path=nowhere", "trainer.max_stepz=1"]
    lines = [
        "import sys, warnings",
        "from recipes import preflight, _start",
        "sys.argv = ['cost', '--config-name=elastic_12b', 'output=out/cost.json']",
        "_start.start('cost')",
        f"print({BEHIND_COST!r}, flush=True)",
        f"print({BEHIND_COST!r}, file=sys.stderr, flush=True)",
        "from megatron.core.transformer import TransformerConfig",
        "import megatron.core.models.mimo.config.base_configs",
        "warnings.warn('The argument order of load has been changed. Please check the document')",
        "warnings.warn('torch.distributed is disabled, unavailable or uninitialized, assuming')",
        "TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)",
        "warnings.warn('something of our own')",
        f"sys.argv = ['preflight', *{wrong}]",
        "try:",
        "    preflight.main()",
        "except SystemExit as left:",
        "    print('preflight left with', left.code)",
        "sys.argv = ['import_hf', 'source=model']",
        "_start.start('import_hf')",
    ]
    return folder, started(folder, "-c", "\n".join(lines))


def test_a_mistake_found_in_the_files_comes_without_a_line_of_hydras(
    one_process: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """The body refuses what no check of the config can see: here a folder that is no model."""
    folder, ended = one_process
    assert ended.returncode == 2 and "model cannot be read as a nemotron_h model" in ended.stderr
    assert "Error executing job" not in ended.stderr and "Traceback" not in ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out"]


def test_a_start_is_free_of_other_packages_warnings_and_of_those_alone(
    one_process: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    said = [line for line in one_process[1].stderr.splitlines() if "Warning" in line]
    assert len(said) == 1 and "something of our own" in said[0], one_process[1].stderr


def test_preflight_prints_every_problem_and_leaves_with_2(
    one_process: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    heading, *lines, left = one_process[1].stdout.partition(f"{BEHIND_COST}\n")[2].splitlines()
    assert heading == f"{len(lines)} problems:" and left == "preflight left with 2"
    fields = {line.strip().partition(" = ")[0] for line in lines}
    layouts = {f"curriculum.{phase}.parallel.tensor x pipeline x context" for phase in (0, 1)}
    assert {"trainer.max_stepz", "data.path", *layouts} <= fields


def test_cost_prints_and_writes_only_what_is_asked_for(
    one_process: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ended = one_process
    shown, said = (text.partition(f"{BEHIND_COST}\n")[0] for text in (ended.stdout, ended.stderr))
    assert said == "" and "12.310B" in shown and "…" not in shown
    assert [path.name for path in (folder / "out").iterdir()] == ["cost.json"]
    report = json.loads((folder / "out" / "cost.json").read_text())
    assert [row["name"] for row in report["budgets"]] == ["12b", "9b", "6b"]
    assert report["parent"]["params"] == 12_310_001_152


def test_rank_that_does_not_come_fails_the_all_reduce_in_time(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = str(listener.getsockname()[1])
    meeting = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = ["-m", "elastic.preflight.collective", f"--folder={tmp_path}", "--timeout=3"]
    ended = started(tmp_path, *program, **meeting, PYTHONWARNINGS="ignore")
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout.startswith("  all-reduce = ") and "rank 0 of 2 failed" in ended.stdout
    assert ended.stdout.count("\n") == 1 and list(tmp_path.iterdir()) == []
