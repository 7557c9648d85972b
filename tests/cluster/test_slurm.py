"""The launchers on a real Slurm of this machine: to the end, through a requeue, and out of a crash.

Nodes of one process each, gloo over loopback, the smallest model; what a user types, with overrides.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from elastic.config.verbs import ElasticConfig
from elastic.data.manifest import checked_manifest
from elastic.data.tokenizer import train_tokenizer
from elastic.verbs.parent import fill_from_parent
from recipes.preflight import compose_run
from tests.cluster.local_slurm import ENDED, LocalSlurm, local_slurm, processes_of, why_not
from tests.cluster.overrides import logged_steps, tiny_overrides
from tests.distributed.harness import run_distributed
from tests.distributed.training import rows, train
from tests.unit.data.preparing import texts, write_jsonl

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "elastic_12b.sh"
ON_CPUS = {
    "PY": sys.executable,
    "GPUS_PER_NODE": "0",
    "PROCESSES_PER_NODE": "1",
    # The nodes' names resolve nowhere, and all of them are this machine.
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONWARNINGS": "ignore",
}
END_S = 480.0  # generous: a busy machine starts a rank in a minute

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """Start four nodes for the tests of this file; all their processes are gone afterwards."""
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with local_slurm(folder, nodes=4) as cluster:
        yield cluster
    assert processes_of(folder) == []


def submit(
    slurm: LocalSlurm, folder: Path, nodes: int, arguments: list[str], launcher: Path = LAUNCHER, **environment: str
) -> int:
    """Submit a job from `folder`, as a user would; the main one if nothing else is said."""
    options = ["--parsable", f"--nodes={nodes}", "--time=00:30:00", str(launcher)]
    return int(slurm.command("sbatch", *options, *arguments, cwd=folder, **ON_CPUS, **environment))


def output_of(folder: Path, job: int) -> str:
    """Return what the job's shell printed, over all its tries."""
    return (folder / f"slurm-{job}.out").read_text()


def wait_for_step(slurm: LocalSlurm, folder: Path, job: int, run: Path, step: int) -> None:
    """Wait until a run has logged a step of a job that was submitted from `folder`."""
    deadline = time.monotonic() + END_S
    while max(logged_steps(run), default=0) < step:
        now = slurm.job(job)
        lives = time.monotonic() < deadline and now["JobState"] not in ("FAILED", "COMPLETED")
        assert lives, f"{dict(now)}\n{output_of(folder, job)}"
        time.sleep(0.2)  # each look is a process of Slurm's


def pid_of_rank(job: int, rank: int) -> int:
    """Find the process of one rank of a job."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables, command = (entry / "environ").read_bytes().split(b"\0"), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        is_rank = f"RANK={rank}".encode() in variables and f"SLURM_JOB_ID={job}".encode() in variables
        if is_rank and b"recipes/train_elastic.py" in command:
            return int(entry.name)
    raise AssertionError(f"job {job} has no process of rank {rank}")


@pytest.mark.slow  # on two nodes the next test shows as much, but for the end
def test_four_nodes_train_to_the_end(slurm: LocalSlurm, start: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, 4, tiny_overrides(start, tmp_path, "four", (3, 2)))
    ended = slurm.wait(job, timeout_s=END_S)
    assert ended["JobState"] == "COMPLETED", output_of(tmp_path, job)
    run = tmp_path / "run" / "four"
    assert json.loads((run / "finished.json").read_text())["step"] == 5
    assert (run / "checkpoints" / "step_00000005" / "record.json").is_file()
    assert logged_steps(run) == [1, 2, 3, 4, 5]
    logs = tmp_path / "logs" / str(job) / "try_0"
    assert {file.name for file in logs.glob("node_*.log")} == {f"node_{node}.log" for node in range(4)}
    assert "4 MiB over 4 ranks" in (logs / "collective_0.log").read_text()


def test_usr1_is_a_checkpoint_a_requeue_and_the_same_losses_and_a_crash_is_the_end(
    slurm: LocalSlurm, start: Path, tmp_path: Path
) -> None:
    """One job of two tries, each of which costs a minute: the second goes on where the first stopped, and crashes."""
    steps = (100_000, 1)
    arguments, run = tiny_overrides(start, tmp_path, "told", steps), tmp_path / "run" / "told"
    job = submit(slurm, tmp_path, 2, arguments)
    wait_for_step(slurm, tmp_path, job, run, 3)
    # What `#SBATCH --signal=B:USR1@300` does five minutes before the time limit.
    slurm.command("scancel", "--batch", "--signal=USR1", str(job))
    waiting = slurm.wait(job, ["PENDING", "COMPLETED", "FAILED"], timeout_s=END_S)
    assert waiting["JobState"] == "PENDING" and waiting["Restarts"] == "1", output_of(tmp_path, job)
    stopped = max(logged_steps(run))
    assert 3 <= stopped < sum(steps)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step_{stopped:08d}"]
    assert slurm.wait(job, ["RUNNING", *ENDED])["JobState"] == "RUNNING", output_of(tmp_path, job)
    wait_for_step(slurm, tmp_path, job, run, stopped + 2)
    killed = time.time()
    os.kill(pid_of_rank(job, 1), signal.SIGABRT)
    ended = slurm.wait(job, timeout_s=END_S)
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] != "0:0"
    assert time.time() - killed < 60
    assert ended["Restarts"] == "1"  # a crash is not a reason to try again
    printed = output_of(tmp_path, job)
    named = printed.partition("the likeliest culprit first:")[2].splitlines()[1]
    assert "rank 1 " in named and "Fatal Python error: Aborted" in named and "node_1.log" in named, printed
    trace = (tmp_path / "logs" / str(job) / "try_1" / "node_1.log").read_text()
    assert "Current thread" in trace and "in fit" in trace  # wherever in a step the signal came
    assert not (run / "finished.json").exists()
    last = max(logged_steps(run))
    assert logged_steps(run) == list(range(1, last + 1))  # the very next step, none twice
    values = compose_run([*tiny_overrides(start, tmp_path, "uninterrupted", steps), f"trainer.max_steps={last}"])
    plain = OmegaConf.to_container(values, resolve=True)
    run_distributed(train, 2, fill_from_parent(ElasticConfig, plain)[0])
    whole_lines(run / "metrics.jsonl")
    expected = rows(tmp_path, "uninterrupted")
    for step, row in rows(tmp_path, "told").items():
        assert row == {name: expected[step].get(name) for name in row}, step  # its own end is validated besides
    tries = sorted((tmp_path / "logs" / str(job)).iterdir())
    assert [folder.name for folder in tries] == ["try_0", "try_1"]
    for logs in tries:
        assert {file.name for file in logs.glob("node_*.log")} == {"node_0.log", "node_1.log"}
        assert "4 MiB over 2 ranks" in (logs / "collective_0.log").read_text()


def whole_lines(log: Path) -> None:
    """Cut off the line that a crash has left half written."""
    log.write_text("".join(log.read_text().rpartition("\n")[:2]))


@pytest.mark.slow
def test_the_verbs_and_phases_as_a_chain_of_jobs(slurm: LocalSlurm, start: Path, tmp_path: Path) -> None:
    steps = (3, 2)
    small = ["trainer=cpu", "parallel.tensor=1", "parallel.sequence=false"]
    place = [f"data.path={start}/data", *small, f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run"]
    importance = [
        *(f"init_from.parent={start}/run/parent", "importance.micro_batch=4", "importance.sequence_length=32"),
        *(
            "importance.max_removed_layers=3",
            "importance.num_sequences=8",
            "importance.depth_sequences=4",
            *place,
            "exp_manager.version=permuted",
        ),
    ]
    evaluate = [
        *(f"init_from.checkpoint={tmp_path}/run/chained", "data.micro_batch=1"),
        *("data.validation_sequences=4", "sequence_length=32", *place, "exp_manager.version=evaluation"),
    ]
    train = tiny_overrides(start, tmp_path, "chained", steps, f"init_from.permuted_parent={tmp_path}/run/permuted")
    chain = {
        "PHASES": "short_context long_context", "OPTIONS": "--nodes=2 --nodes=1", "IMPORTANCE": " ".join(importance),
        "EVALUATE": " ".join(evaluate),
    }  # fmt: skip
    said = slurm.command("bash", str(ROOT / "launch" / "chain.sh"), *train, cwd=tmp_path, **ON_CPUS, **chain)
    jobs = [int(line.split()[2].rstrip(":")) for line in said.splitlines() if line.startswith("chain: job")]
    assert len(jobs) == 4
    for job in jobs:
        assert slurm.wait(job, timeout_s=END_S)["JobState"] == "COMPLETED", output_of(tmp_path, job)
    run = tmp_path / "run" / "chained"
    assert logged_steps(run) == [1, 2, 3, 4, 5]
    assert json.loads((run / "finished.json").read_text())["step"] == sum(steps)
    first_phase = tmp_path / "logs" / str(jobs[1]) / "try_0"
    assert {file.name for file in first_phase.glob("node_*.log")} == {"node_0.log", "node_1.log"}
    evaluation = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert [row["name"] for row in evaluation["members"]] == ["full", "medium", "small"]


@pytest.mark.slow
def test_the_smoke_chain_is_a_job(slurm: LocalSlurm, tmp_path: Path) -> None:
    short = [
        "pretrain_parent:trainer.max_steps=4",
        "estimate_importance:importance.depth=one_shot",
        "train_elastic:trainer.max_steps=4",
        "evaluate:data.validation_sequences=4",
    ]
    job = submit(slurm, tmp_path, 1, short, ROOT / "launch" / "smoke.sh")
    assert slurm.wait(job, timeout_s=900.0)["JobState"] == "COMPLETED", output_of(tmp_path, job)
    summary = json.loads((tmp_path / "runs" / "smoke" / "summary.json").read_text())
    assert summary and (tmp_path / "runs" / "smoke" / "family.png").stat().st_size > 10_000
    assert "one run, a family" in (tmp_path / "logs" / str(job) / "try_0" / "node_0.log").read_text()


def test_an_array_of_jobs_prepares_one_folder(slurm: LocalSlurm, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", texts())
    train_tokenizer(texts(), 300, tmp_path / "tokenizer")
    arguments = [f"paths=[{tmp_path}/texts.jsonl]", "document_format=jsonl", f"output_dir={tmp_path}/data"]
    command = [
        "bash",
        str(ROOT / "launch" / "prepare_array.sh"),
        "2",
        *arguments,
        f"tokenizer_path={tmp_path}/tokenizer",
    ]
    options = {"OPTIONS": "--parsable --time=00:30:00", "PY": sys.executable, "PYTHONWARNINGS": "ignore"}
    job = int(slurm.command(*command, cwd=tmp_path, **options))
    for shard in (1, 2):
        ended = slurm.wait(f"{job}_{shard}", timeout_s=END_S)
        assert ended["JobState"] == "COMPLETED", (tmp_path / f"slurm-{job}_{shard}.out").read_text()
    assert checked_manifest(tmp_path / "data", verify="full").num_documents == len(texts())
    with pytest.raises(RuntimeError, match="the first argument is the number of shards"):
        slurm.command(*command[:2], *arguments, cwd=tmp_path)


@pytest.mark.parametrize("name", ["elastic_12b", "importance_12b", "evaluate", "smoke", "prepare_array"])
def test_sbatch_accepts_the_launcher_as_it_is(slurm: LocalSlurm, name: str) -> None:
    printed = slurm.command("sbatch", "--test-only", "--partition=all", str(ROOT / "launch" / f"{name}.sh"))
    assert "to start at" in printed
