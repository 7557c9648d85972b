"""Resume: exact at the same layout, equal at another; and what all ranks must agree on."""

import shutil

import pytest
import torch

from elastic.train.checkpoint import list_checkpoints
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import elastic_values, prepare_start, rows, train, train_and_be_killed

FOUR = dict(tensor=2, pipeline=2, sequence=True, recompute="full")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    run_distributed(prepare_start, 1, folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(start):
    run_distributed(train, 1, elastic_values(start, "uninterrupted"))
    return rows(start, "uninterrupted")


def assert_close(found, expected, steps):
    for step in steps:
        assert found[step].keys() >= expected[step].keys()  # an early end validates once more
        for name, value in expected[step].items():
            assert found[step][name] == pytest.approx(value, rel=1e-5, abs=1e-7), f"{name} at step {step}"


def test_two_replicas_train_like_one_process(start, uninterrupted):
    run_distributed(train, 2, elastic_values(start, "two_replicas"))
    assert_close(rows(start, "two_replicas"), uninterrupted, uninterrupted)


def test_save_at_tp2_pp2_resume_at_one_process_and_at_dp2(start, uninterrupted):
    values = elastic_values(start, "four", parallel=FOUR, trainer=dict(max_steps=4))
    run_distributed(train, 4, values)
    assert_close(rows(start, "four"), uninterrupted, range(1, 5))
    shutil.copytree(start / "run" / "four", start / "run" / "four_on_dp2")
    run_distributed(train, 1, elastic_values(start, "four"))
    run_distributed(train, 2, elastic_values(start, "four_on_dp2"))
    assert_close(rows(start, "four"), uninterrupted, range(5, 10))
    assert_close(rows(start, "four_on_dp2"), uninterrupted, range(5, 10))


def test_killed_after_a_checkpoint_resumes_to_the_last_digit(start, uninterrupted):
    values = elastic_values(start, "killed")
    with pytest.raises(DistributedRunError):
        run_distributed(train_and_be_killed, 1, values, "step_00000003", 4)
    before = rows(start, "killed")
    assert 4 in before and 9 not in before
    assert [path.name for path in list_checkpoints(start / "run" / "killed")][0] == "step_00000003"
    run_distributed(train, 1, values)
    assert rows(start, "killed") == uninterrupted


def test_two_killed_replicas_resume_to_the_last_digit(start):
    run_distributed(train, 2, elastic_values(start, "pair"))
    values = elastic_values(start, "killed_pair")
    with pytest.raises(DistributedRunError):
        run_distributed(train_and_be_killed, 2, values, "step_00000003", 4)
    run_distributed(train, 2, values)
    assert rows(start, "killed_pair") == rows(start, "pair")


def router_bits(values):
    """Train, then return this rank's router weights: every rank holds a replica."""
    from pathlib import Path

    from safetensors.torch import load_file

    train(values)
    manager = values["exp_manager"]
    newest = list_checkpoints(Path(manager["exp_dir"]) / manager["name"] / manager["version"])[-1]
    return load_file(newest / "router.safetensors")


def test_the_router_is_trained_and_saved_once_for_all_ranks(start, uninterrupted):
    saved = router_bits(elastic_values(start, "uninterrupted", trainer=dict(max_steps=9)))
    assert any(name.startswith("adam/") for name in saved)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
