"""The launchers' shell: rules that shellcheck (`make lint`) does not know, and what they do when Slurm or a rank
answers in its various ways.

What it calls is a stand-in (launcher_job.py); tests/cluster runs the real ones.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs.launcher_job import LAUNCH, LAUNCHERS, ROOT, Job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    (tmp_path / "job").mkdir()
    yield Job(tmp_path / "job")


# What the files must look like


def commands_and_options(text: str) -> tuple[list[int], list[int]]:
    """Return the line numbers of #SBATCH lines and of commands."""
    lines = list(enumerate(text.splitlines(), start=1))
    return (
        [number for number, line in lines if line.startswith("#SBATCH")],
        [number for number, line in lines if line.strip() and not line.startswith("#")],
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_sbatch_option_stands_after_the_first_command(name: str) -> None:
    """Slurm would silently ignore it, and `sbatch --test-only` does not tell."""
    options, commands = commands_and_options((LAUNCH / f"{name}.sh").read_text())
    assert options and max(options) < min(commands)
    late = "#!/bin/bash\n#SBATCH --nodes=1\nset -e\n#SBATCH --time=1\n"
    options, commands = commands_and_options(late)
    assert max(options) > min(commands)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_passes_everything_on(name: str) -> None:
    last = (LAUNCH / f"{name}.sh").read_text().splitlines()[-1]
    assert re.fullmatch(rf'launch {LAUNCHERS[name]}( --config-name=\w+)? "\$@"', last)


def test_only_the_training_job_is_signalled_and_requeued() -> None:
    headers = {name: (LAUNCH / f"{name}.sh").read_text() for name in LAUNCHERS}
    assert "#SBATCH --signal=B:USR1@300\n#SBATCH --requeue\n#SBATCH --open-mode=append" in headers["elastic_12b"]
    assert all("#SBATCH --no-requeue" in headers[name] for name in ("importance_12b", "evaluate"))


def test_every_variable_of_the_environment_has_its_reason() -> None:
    lines = (LAUNCH / "env.sh").read_text().splitlines()
    exports = [number for number, line in enumerate(lines) if line.strip().startswith("export ")]
    assert len(exports) >= 10
    for number in exports:
        above = lines[number - 1].strip()
        assert above.startswith(("#", "export TORCH_NCCL_")), f"no reason above {lines[number]}"


# What a job does


def test_a_job_checks_every_node_then_all_ranks_then_trains(job: Job) -> None:
    ended = job.start("elastic_12b", "seed=3", "data.path=x y")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    preflight, collective, train = job.calls("srun")
    assert "--kill-on-bad-exit=0" in preflight and "--gpus=8" in preflight and "--processes=16" in preflight
    for call in (preflight, train):
        assert call.endswith("--config-name=elastic_12b seed=3 data.path=x y")
    for call in (collective, train):
        assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in call and "--kill-on-bad-exit=1 --wait=60" in call
        assert "--nnodes=2 --nproc-per-node=8 --master-addr=first --master-port=12007" in call
    assert "elastic.preflight.collective" in collective and "recipes/train_elastic.py" in train
    logs = job.folder / "logs" / "7" / "try_0"
    assert (logs / "node_1.log").read_text() == "trained on node 1\n"


def test_problems_of_the_nodes_are_merged_and_nothing_starts(job: Job) -> None:
    job.preflight = (
        'echo "2 problems:"; echo "  data.path = null: missing; set it"; '
        'if [ "$SLURM_NODEID" = 1 ]; then echo "  number of GPUs = 7: must be 8; leave it out"; fi; exit 2'
    )
    ended = job.start("elastic_12b")
    assert ended.returncode == 2
    assert ended.stdout.splitlines()[-2:] == [
        "  data.path = null: missing; set it  [every node]",
        "  number of GPUs = 7: must be 8; leave it out  [node 1]",
    ]
    assert "preflight failed, nothing was started" in ended.stdout
    assert len(job.calls("srun")) == 1


def test_preflight_that_dies_is_shown_by_its_last_lines(job: Job) -> None:
    job.preflight = 'echo "ModuleNotFoundError: No module named torch"; exit 1'
    ended = job.start("elastic_12b")
    assert ended.returncode == 2 and "ModuleNotFoundError: No module named torch" in ended.stdout


def test_ranks_that_do_not_meet_end_the_job_before_training(job: Job) -> None:
    job.collective = 'echo "  all-reduce = n2: rank 9 of 16 failed; check the fabric"; exit 1'
    ended = job.start("elastic_12b")
    assert ended.returncode == 2 and "all-reduce = n2: rank 9 of 16 failed" in ended.stdout
    assert len(job.calls("srun")) == 2


def test_a_finished_run_ends_the_chain(job: Job) -> None:
    job.plan(finished="yes")
    ended = job.start("elastic_12b", SLURM_RESTART_COUNT="1")
    assert ended.returncode == 0 and "finished already" in ended.stdout
    assert len(job.calls("srun")) == 1


def test_usr1_reaches_the_step_and_the_job_goes_back_into_the_queue(job: Job) -> None:
    wait = 'for try in {1..600}; do if [ -e "$ELASTIC_STOP_FILE" ]; then break; fi; sleep 0.05; done'
    look = 'ls "$ELASTIC_STOP_FILE"'
    signal_and_look = f'{{ {look}; kill -USR1 "$(cat launcher)"; {wait}; {look}; }}'
    job.train = f'if [ "$SLURM_NODEID" = 0 ]; then {signal_and_look} >looked 2>/dev/null; fi'
    ended = job.start("elastic_12b", SLURM_RESTART_COUNT="1", MAX_REQUEUES="2", BASH_ENV=remember_pid(job))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "requeue 2 of at most 2" in ended.stdout
    assert job.calls("scontrol requeue") == ["scontrol requeue 7"]
    # Ranks that still load find out by a file of this try, which was not there before.
    assert (job.folder / "looked").read_text() == f"{job.folder}/logs/7/try_1/stop\n"


def test_requeues_are_counted(job: Job) -> None:
    job.train = 'if [ "$SLURM_NODEID" = 0 ]; then kill -USR1 "$(cat launcher)"; sleep 1; fi'
    ended = job.start("elastic_12b", SLURM_RESTART_COUNT="2", MAX_REQUEUES="2", BASH_ENV=remember_pid(job))
    assert ended.returncode == 75 and "requeues used: 2 of 2" in ended.stdout
    assert job.calls("scontrol requeue") == []


def test_requeues_by_slurm_itself_count_too(job: Job) -> None:
    ended = job.start("elastic_12b", SLURM_RESTART_COUNT="3", MAX_REQUEUES="2")
    assert ended.returncode == 75
    assert job.calls("srun") == [] and job.calls("scontrol requeue") == []


def test_usr1_in_the_last_step_does_not_requeue_a_finished_run(job: Job) -> None:
    job.train = 'if [ "$SLURM_NODEID" = 0 ]; then kill -USR1 "$(cat launcher)"; sleep 1; fi'
    job.finish(step=9)
    ended = job.start("elastic_12b", BASH_ENV=remember_pid(job))
    assert ended.returncode == 0 and job.calls("scontrol requeue") == []
    job.finish(step=5)  # the flag of an earlier, shorter run
    ended = job.start("elastic_12b", BASH_ENV=remember_pid(job))
    assert job.calls("scontrol requeue") == ["scontrol requeue 7"]


def remember_pid(job: Job) -> str:
    """Return a start-up file with which the launcher's own shell writes down its process number."""
    file = job.folder / "start_up"
    file.write_text('if [[ $0 == *elastic_12b.sh ]]; then echo "$$" >launcher; fi\n')
    return str(file)


ROOT_CAUSE = """\
Root Cause (first observed failure):
[0]:
  time      : 2026-01-02_03:04:0{second}
  host      : {host}
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: 11)
"""


def test_a_failure_names_the_rank_that_caused_it_before_those_that_lost_it(job: Job) -> None:
    peer = "[rank0]: RuntimeError: Connection closed by peer\n" + ROOT_CAUSE.format(second=1, host="a", rank=0, code=1)
    cause = "[rank1]: ValueError: loss is NaN\n" + ROOT_CAUSE.format(second=2, host="b", rank=1, code=1)
    (job.folder / "said_0").write_text(peer)
    (job.folder / "said_1").write_text(cause)
    job.train = 'cat "said_$SLURM_NODEID"; exit 1'
    ended = job.start("elastic_12b")
    assert ended.returncode == 1
    named = ended.stdout.partition("the likeliest culprit first:\n")[2].splitlines()
    assert named[0].startswith("  rank 1 on b, exit code 1: ValueError: loss is NaN (") and "node_1.log" in named[0]
    assert "rank 0 on a" in named[1] and "Connection closed" in named[1]
    assert job.calls("scontrol requeue") == []


def test_a_rank_that_waited_in_vain_names_the_one_it_waited_for(job: Job) -> None:
    said = [
        "watchdog: rank 0 on a has made no progress for 600 s: step 3, forward and backward",
        "Thread 0x00007fc48b7fe6c0 (most recent call first):",
        "watchdog: rank 0 on a: rank 1 gives no sign of life, last seen at step 3, optimizer",
    ]
    (job.folder / "said_0").write_text("\n".join(said) + "\n" + ROOT_CAUSE.format(second=1, host="a", rank=0, code=75))
    job.train = 'if [ "$SLURM_NODEID" = 0 ]; then cat said_0; exit 1; fi'
    named = job.start("elastic_12b").stdout.partition("the likeliest culprit first:\n")[2].splitlines()
    assert named[0].startswith("  rank 0 on a, exit code 75: rank 1 gives no sign of life, last seen at step 3, opt")


def test_a_job_that_ends_with_a_phase_says_so_to_the_recipe(job: Job) -> None:
    job.plan(finished="no", override="trainer.max_steps=5166")
    assert job.start("elastic_12b", "seed=3", PHASE="short_context").returncode == 0
    preflight, _, train = job.calls("srun")
    assert "--phase=short_context" in preflight and train.endswith("seed=3 trainer.max_steps=5166")


def test_smoke_checks_the_node_and_runs_the_chain(job: Job) -> None:
    assert job.start("smoke", "train_elastic:seed=1").returncode == 0
    preflight, chain = job.calls("srun")
    assert preflight.endswith("smoke train_elastic:seed=1")
    assert chain.endswith("recipes/smoke.py train_elastic:seed=1") and "torch.distributed.run" not in chain


def test_the_image_is_mounted_with_all_that_the_run_reads(job: Job) -> None:
    (job.folder / "data").mkdir()
    for name in ("web", "pairs", "more"):
        (job.folder / name).mkdir()
    (job.folder / "pairs" / "text_document.idx").touch()
    pairs = f"{{weight: 1,path:'{job.folder}/pairs/text_document'}}"
    blend = f"data.blend=[{{path: {job.folder}/web, weight: 0.5}},\n{pairs}]"
    more = f"data.blend=[0.3, {job.folder}/more, 0.7, {job.folder}/data]"
    overrides = [f"data.path={job.folder}/data", "init_from.permuted_parent=/not/there", blend, more]
    image = {"CONTAINER_IMAGE": "registry#elastic:1", "CONTAINER_MOUNTS": "/scratch:/scratch", "PY": "python"}
    assert job.start("elastic_12b", *overrides, **image).returncode == 0
    folders = (ROOT, job.folder, *(job.folder / name for name in ("data", "web", "pairs", "more")), "/scratch")
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    for call in job.calls("srun"):
        assert (
            f"--container-image=registry#elastic:1 --container-mounts={mounts} --container-workdir={job.folder} "
            in call
        )


def test_an_own_run_is_shown_by_a_dry_run_passed_on_and_mounted(job: Job) -> None:
    """`--config-dir` names a folder beside conf/: an own run, and an own file of a group, on a cluster."""
    (job.folder / "own" / "parallel").mkdir(parents=True)
    (job.folder / "own" / "mine.yaml").write_text("defaults: [elastic_12b, _self_]\nseed: 77\n")
    (job.folder / "own" / "parallel" / "wide.yaml").write_text("tensor: 4\npipeline: 1\ncontext: 4\nsequence: true\n")
    (job.folder / "own" / "trainer").mkdir()
    (job.folder / "own" / "trainer" / "gpu.yaml").write_text("precision: bf16\nnum_threads: 5\n")
    arguments = ["--config-name=mine", f"--config-dir={job.folder}/own", "parallel=wide", "trainer.max_steps=3"]
    ended = job.start("elastic_12b", *arguments, python=sys.executable, DRY_RUN="1", SLURM_JOB_ID="unset")
    # A dry run prints the command and the config, and starts nothing.
    assert "srun --nodes=64 --ntasks=64 --ntasks-per-node=1" in ended.stdout
    assert "--nproc-per-node=8" in ended.stdout and "trainer.max_steps=3" in ended.stdout
    assert "\n  max_steps: 3\n" in ended.stdout and "name: short_context" in ended.stdout
    assert job.calls("srun") == [] and not (job.folder / "logs").exists()
    assert "\nseed: 77\n" in ended.stdout and "  context: 4\n  sequence: true\n" in ended.stdout
    assert "num_threads: 5" in ended.stdout  # of two files with one name the own one counts, as in Hydra
    assert ended.stdout.count("data.path = null: missing") == 1 and ended.returncode == 2
    (job.folder / "far").mkdir()
    image = {"CONTAINER_IMAGE": "registry#elastic:1", "PY": "python"}
    for given, shown in ((f"{job.folder}/own", f"{job.folder}/own"), ("../job/far", f"{job.folder}/far")):
        assert job.start("elastic_12b", "--config-name=mine", f"--config-dir={given}", **image).returncode == 0
        *_, preflight, _, train = job.calls("srun")
        assert f",{shown}:{shown} --container-workdir" in preflight
        assert all(call.endswith(f"--config-name=mine --config-dir={given}") for call in (preflight, train))
    assert "--config-name=elastic_12b --config-name=mine" in train


def test_phases_are_submitted_as_a_chain(job: Job) -> None:
    more = {"IMPORTANCE": "init_from.parent=p", "EVALUATE": "init_from.checkpoint=r", "OPTIONS": "--nodes=4 --nodes=2"}
    ended = job.start("chain", "seed=3", **more)
    assert ended.returncode == 0, ended.stderr
    then = "--parsable --dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert job.calls("sbatch") == [
        f"sbatch PHASE= --parsable {LAUNCH}/importance_12b.sh init_from.parent=p",
        f"sbatch PHASE=short_context {then.format(1)} --nodes=4 {LAUNCH}/elastic_12b.sh seed=3",
        f"sbatch PHASE=long_context {then.format(2)} --nodes=2 {LAUNCH}/elastic_12b.sh seed=3",
        f"sbatch PHASE= {then.format(3)} {LAUNCH}/evaluate.sh init_from.checkpoint=r",
    ]
