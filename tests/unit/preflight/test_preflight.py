"""Preflight: each kind of trouble, really there or handed in as a fact, has its own message and ends in code 2."""

import argparse
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from elastic.checkpoint.contents import write_contents
from elastic.checkpoint.record import Record
from elastic.config.load import Problem, load
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ModelConfig
from elastic.config.verbs import ElasticConfig
from elastic.preflight.node import Gpu, Node, node_problems, package_problems, probe, probe_packages
from elastic.preflight.run import (
    FINISHED_FILE,
    checkpoint_bytes,
    memory_problems,
    plan_run,
    state_bytes_per_rank,
)
from elastic.verbs.parent import fill_from_parent
from recipes._tiny_family import prepare_corpus
from recipes.preflight import check_run, compose_run, requirements
from tests.cluster.overrides import tiny_overrides
from tests.distributed.training import MODEL, write_corpus

H100 = Gpu("H100", total_bytes=80 << 30, free_bytes=79 << 30)
GOOD = Node({}, {}, (H100,) * 8, "13.0", has_nccl=True)


def only(problems: Any) -> Problem:
    """Return the one problem there must be."""
    found = list(problems)
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


def options(*arguments: str, gpus: int = 0, processes: int = 2, **more: Any) -> argparse.Namespace:
    """Return what the recipe's command line would hold."""
    values = dict(verb="train_elastic", plan=None, phase=None, show=False, gpus=gpus, processes=processes)
    return argparse.Namespace(arguments=list(arguments), **{**values, **more})


def problems_of(*arguments: str, **more: Any) -> list[Problem]:
    """Check a run of elastic_12b with these overrides on a healthy node."""
    name = more.pop("config", "elastic_12b")
    return check_run(options(f"--config-name={name}", *arguments, **more), replace(GOOD, gpus=()))


# The node


def test_a_healthy_node_has_no_problem() -> None:
    assert list(node_problems(GOOD, 8)) == []
    versions = probe_packages(requirements(with_gpus=False))
    assert list(package_problems(sys.version_info[:2], versions, requirements(with_gpus=False))) == []


def test_wrong_python() -> None:
    problem = only(package_problems((3, 11), {}, []))
    assert str(problem) == 'python = "3.11": must be 3.12 or 3.13; run `make setup`, or set PY=FILE'


def test_missing_package_and_wrong_version() -> None:
    versions = {"no-such-package-anywhere": None, "torch": "1.9", "megatron-core": "0.19.2"}
    wanted = ["no-such-package-anywhere", "torch>=2.6", "megatron-core>=0.19,<0.20"]
    missing, wrong = package_problems((3, 12), versions, wanted)
    assert (missing.field, missing.rule) == ("package no-such-package-anywhere", "is not installed")
    assert (wrong.field, wrong.value, wrong.rule) == ("package torch", "1.9", "must be >=2.6")
    assert probe_packages(["no-such-package-anywhere"]) == {"no-such-package-anywhere": None}


def test_nvidias_own_builds_satisfy_the_requirements() -> None:
    assert list(package_problems((3, 12), {"torch": "2.9.0a0+50eac811a6.nv25.9"}, ["torch>=2.6"])) == []


def test_a_gpu_run_asks_for_the_kernels_and_a_cpu_run_does_not() -> None:
    kernels = {"transformer-engine[pytorch]", "mamba-ssm>=2.3"}
    assert set(requirements(with_gpus=True)) - set(requirements(with_gpus=False)) == kernels


def test_too_few_gpus() -> None:
    problem = only(node_problems(replace(GOOD, gpus=(H100,) * 7), 8))
    assert str(problem).startswith("number of GPUs = 7: must be the 8 that the job asked for; leave the node out")


def test_no_gpu_seen_by_cuda() -> None:
    assert "CUDA 13.0 sees none" in only(node_problems(replace(GOOD, gpus=()), 8)).rule


def test_memory_of_a_gpu_held_by_another_process() -> None:
    busy = replace(H100, free_bytes=30 << 30)
    problem = only(node_problems(replace(GOOD, gpus=(*GOOD.gpus[:7], busy)), 8))
    assert (problem.field, problem.value) == ("GPU 7 memory", "30.0 GiB")
    assert "another process holds the rest" in problem.rule


def test_torch_without_cuda_and_without_nccl() -> None:
    assert "built without CUDA" in only(node_problems(replace(GOOD, torch_cuda=None), 8)).rule
    assert "built without NCCL" in only(node_problems(replace(GOOD, has_nccl=False), 8)).rule


def test_kernel_that_is_installed_and_does_not_import() -> None:
    broken = replace(GOOD, versions={"mamba-ssm": "2.2"}, import_errors={"mamba-ssm": "ImportError: undefined symbol"})
    problem = only(node_problems(broken, 8))
    assert (problem.field, problem.value) == ("package mamba-ssm", "2.2")
    assert "undefined symbol" in problem.rule and "pip install" in problem.remedy


def test_taken_port() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        node = probe({}, with_gpus=False, port=port)
        problem = only(node_problems(node, 0))
        assert (problem.field, problem.value) == ("MASTER_PORT", port)
    assert probe({}, with_gpus=False, port=port).busy_port is None


# The run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare data, and make a folder look like a permuted parent of it: nobody reads weights here."""
    folder = tmp_path_factory.mktemp("start")
    write_corpus(folder / "corpus")
    prepare_corpus(folder)
    permuted = folder / "run" / "permuted"
    permuted.mkdir(parents=True)
    shape = load(ModelConfig, MODEL).shape()
    Record("permuted_parent", shape, 8, tuple(range(len(shape.pattern))), str(folder / "data")).write(permuted)
    write_contents(permuted, {})
    return folder


def test_a_legal_run_has_no_problem_and_leaves_its_plan(start: Path, tmp_path: Path) -> None:
    arguments = tiny_overrides(start, tmp_path, "fine", (3, 2))
    assert problems_of(*arguments, plan=tmp_path / "plan") == []
    plan = (tmp_path / "plan_0").read_text()
    assert plan == f"run_dir={tmp_path}/run/fine\ntotal_steps=5\nfinished=no\noverride=\n"
    assert not (tmp_path / "run").exists()


def test_all_mistakes_of_the_config_come_together(start: Path, tmp_path: Path) -> None:
    arguments = tiny_overrides(start, tmp_path, "wrong", (3, 2), "trainer.max_stepz=3", "seed=x", "data.path=nowhere")
    assert {problem.field for problem in problems_of(*arguments)} == {"trainer.max_stepz", "seed", "data.path"}


def test_override_of_a_group_that_is_not_there() -> None:
    problem = only(problems_of("budgets=no_such_family"))
    assert (problem.field, problem.value) == ("budgets", "no_such_family") and "nemotron_elastic" in problem.remedy


def test_layout_that_does_not_divide_the_ranks(start: Path, tmp_path: Path) -> None:
    problem = only(problems_of(*tiny_overrides(start, tmp_path, "layout", (3, 2), "parallel.tensor=4"), processes=2))
    assert problem.field == "parallel.tensor x pipeline x context"
    assert "must divide the number of processes = 2" in problem.rule


def test_missing_checkpoint(start: Path, tmp_path: Path) -> None:
    gone = f"init_from.permuted_parent={tmp_path}/gone"
    assert only(problems_of(*tiny_overrides(start, tmp_path, "gone", (3, 2), gone))).rule == "does not exist"


def test_folder_that_is_no_checkpoint(start: Path, tmp_path: Path) -> None:
    other = f"init_from.permuted_parent={tmp_path}"
    problem = only(problems_of(*tiny_overrides(start, tmp_path, "other", (3, 2), other)))
    assert "neither a checkpoint nor a run folder" in problem.rule


def test_damaged_data(start: Path, tmp_path: Path) -> None:
    shutil.copytree(start / "data", tmp_path / "data")
    with (tmp_path / "data" / "train.bin").open("r+b") as stream:
        stream.truncate(10)
    damaged = f"data.path={tmp_path}/data"
    problem = only(problems_of(*tiny_overrides(start, tmp_path, "damaged", (3, 2), damaged)))
    assert problem.field == "data.path" and "train.bin has 10 bytes" in problem.rule


def test_disk_too_small_for_the_checkpoints(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = tiny_overrides(start, tmp_path, "disk", (3, 2), "exp_manager.keep_last_checkpoints=1000")
    assert problems_of(*arguments) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    problem = only(problems_of(*arguments))
    assert problem.field == f"free disk at {tmp_path}" and "for 1001 checkpoints of" in problem.rule


def test_a_job_may_not_remove_its_own_earlier_tries(start: Path, tmp_path: Path) -> None:
    replace_run = ("exp_manager.overwrite=true", "exp_manager.resume_if_exists=false")
    problem = only(problems_of(*tiny_overrides(start, tmp_path, "again", (3, 2), *replace_run)))
    assert problem.field == "exp_manager.overwrite" and "every try of a job" in problem.rule


def test_run_folder_that_may_not_be_written(start: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problem = only(problems_of(*tiny_overrides(start, tmp_path / "file", "nowhere", (3, 2))))
    assert problem.field == "exp_manager.exp_dir" and "may not be written" in problem.rule


def test_phase_that_the_curriculum_does_not_have(start: Path, tmp_path: Path) -> None:
    problem = only(problems_of(*tiny_overrides(start, tmp_path, "phase", (3, 2)), phase="middle"))
    assert str(problem) == 'PHASE = "middle": is not in the curriculum; it has short_context, long_context'


def tiny_config(start: Path, folder: Path, *more: str) -> ElasticConfig:
    cfg = compose_run(tiny_overrides(start, folder, "run", (3, 2), *more))
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return load(ElasticConfig, fill_from_parent(ElasticConfig, values)[0])


def test_gpu_too_small_for_weights_and_optimizer(start: Path, tmp_path: Path) -> None:
    """By hand for the 12B: 12.31e9 x (2 x 2 weights + 4 gradients + 12 Adam over 2 shards) / 8 tensor ranks."""
    data = f"data.path={start}/data"
    cfg = compose_run(["--config-name=elastic_12b", data, f"init_from.permuted_parent={start}/run/permuted"])
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    parallel = {"tensor": 8, "context": 2, "sequence": True}
    own = load(ElasticConfig, values | {"parallel": parallel})  # tensor 8, then the second phase's 4
    one_layout = [phase | {"parallel": None} for phase in values["curriculum"]]
    config = load(ElasticConfig, values | {"parallel": parallel, "curriculum": one_layout})
    cluster = Cluster(num_processes=16, has_gpu=True)
    assert state_bytes_per_rank(config, cluster) == pytest.approx(12_310_001_152 * (4 + 4 + 6) / 8)
    assert checkpoint_bytes(config) == 12_310_001_152 * 14
    assert list(memory_problems(config, cluster, [H100])) == []
    small = Gpu("small", total_bytes=20 << 30, free_bytes=20 << 30)
    problem = only(memory_problems(config, cluster, [H100, small]))
    assert (problem.field, problem.value) == ("GPU memory", "20.0 GiB") and "20.1 GiB" in problem.rule
    assert "raise parallel.tensor or" in problem.remedy
    problem = only(memory_problems(own, cluster, [H100, small]))
    assert "31.5 GiB" in problem.rule and "raise curriculum.1.parallel.tensor or" in problem.remedy


def test_plan_ends_with_the_phase_and_knows_a_finished_run(start: Path, tmp_path: Path) -> None:
    config = tiny_config(start, tmp_path)
    plan = plan_run(config, "short_context")
    assert (plan["total_steps"], plan["override"], plan["finished"]) == (3, "trainer.max_steps=3", "no")
    run = tmp_path / "run" / "run"
    run.mkdir(parents=True)
    (run / FINISHED_FILE).write_text('{"step": 3, "total_steps": 3}')
    assert plan_run(config, "short_context")["finished"] == "yes"
    assert plan_run(config, None)["finished"] == "no"  # the second phase is still to come
    (run / FINISHED_FILE).write_text("{")
    assert plan_run(config, "short_context")["finished"] == "no"
