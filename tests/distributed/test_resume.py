"""Going on: one table of optimizers, precisions and changes of layout, then interruptions of every kind."""

import json
import os
import signal
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from rich.console import Console

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.read import StoredTensors, read_metadata
from elastic.checkpoint.record import Record
from elastic.config.load import load
from elastic.config.verbs import ElasticConfig
from elastic.model import initialize
from elastic.train.callbacks import SaveCheckpoints
from elastic.train.nonfinite import SkippedSteps
from elastic.train.trainer import Callback
from elastic.verbs.training import run_training
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import (
    elastic_values,
    rows,
    split_values,
    train,
    train_and_be_killed,
    train_and_be_told_to_stop,
    train_fused,
)

FOUR = dict(tensor=2, pipeline=2, sequence=True, recompute="full")


@dataclass(frozen=True)
class Leg:
    """A part of a run: where it runs, and after which step it ends."""

    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    stop: int | None = None
    micro_batch: int = 2


@dataclass(frozen=True)
class Case:
    """A run in legs, and the uninterrupted one it must equal: `within` 0 to the last digit."""

    legs: tuple[Leg, ...]
    sharded: bool = False  # the distributed optimizer, over a stand-in for fused Adam
    overlapped: bool = False  # gradients' reduction and weights' gather; no gather is done before somebody waits
    precision: str = "fp32"
    within: float = 0.0
    reference: str = "fp32"
    names: tuple[str, ...] = ()  # of the values compared; none: all


TENSOR_2, PIPELINE_2 = dict(tensor=2), dict(pipeline=2)
VALIDATION = ("validation/full/loss", "validation/half/loss")
CASES = {
    # Uninterrupted
    "fp32": Case((Leg(),)),
    "fp32_dp2": Case((Leg(2),), within=1e-5),
    "fp32_dp4_of_two_micro_batches_for_four_draws": Case((Leg(4, micro_batch=1),), within=1e-5),
    "bf16": Case((Leg(),), precision="bf16", reference="bf16"),
    "sharded_bf16": Case((Leg(2, micro_batch=1),), sharded=True, precision="bf16", reference="sharded_bf16"),
    # The same layout: to the last digit
    "fp32_at_the_phases_boundary": Case((Leg(stop=5), Leg())),
    # A_log and D stay in fp32: an optimizer that counts the bf16 weights alone mixes all of them up
    "bf16_again": Case((Leg(stop=4), Leg()), precision="bf16", reference="bf16"),
    "sharded_bf16_again": Case(
        (Leg(2, stop=4, micro_batch=1), Leg(2, micro_batch=1)),
        sharded=True, precision="bf16", reference="sharded_bf16",
    ),
    # What overlaps changes no digit, and nobody reads a weight, validates or saves before it is there
    "sharded_bf16_overlapped": Case(
        (Leg(2, stop=3, micro_batch=1), Leg(2, micro_batch=1)),
        sharded=True, overlapped=True, precision="bf16", reference="sharded_bf16",
    ),
    # Another layout or micro-batch
    "fp32_four_to_dp2_to_one": Case((Leg(4, FOUR, 4), Leg(2, stop=7), Leg(micro_batch=1)), within=1e-5),
    "bf16_tp2_to_one": Case(
        (Leg(2, TENSOR_2, 4), Leg()), precision="bf16", reference="bf16", within=1e-3, names=VALIDATION
    ),
    "sharded_fp32_tp2_to_pp2_to_dp2": Case(
        (Leg(4, TENSOR_2, 3), Leg(2, PIPELINE_2, 6), Leg(2)),
        sharded=True, within=1e-5, names=("train/full/kl", "train/half/kl", "grad_norm"),
    ),
}  # fmt: skip


def train_overlapped(values):
    """Train while a gather that is started does nothing until it is waited for: the longest that it may take.

    Nor is a weight drawn that a checkpoint's then replaces.
    """
    started, drawn = [], []
    late = mock.patch.object(DistributedDataParallel, "start_param_sync", lambda *_: started.append(1))
    with late, mock.patch.object(initialize, "initial_tensor", lambda *_: drawn.append(1)):
        train_fused(values)
    assert started and not drawn


TRAIN = {(False, False): train, (True, False): train_fused, (True, True): train_overlapped}


@cache
def ran(start: Path, name: str) -> dict[int, dict[str, float]]:
    """Run a case, once; returns its rows. Each leg says how it ended."""
    case = CASES[name]
    for leg in case.legs:
        data = dict(path=str(start / "data"), micro_batch=leg.micro_batch, validation_sequences=4)
        trainer = dict(precision=case.precision, max_steps=leg.stop)
        optim = dict.fromkeys(("overlap_grad_reduce", "overlap_param_gather"), case.overlapped)
        optim["use_distributed_optimizer"] = case.sharded
        values_of = split_values if case.precision == "fp32" else elastic_values
        values = values_of(start, name, parallel=leg.parallel, optim=optim, trainer=trainer, data=data)
        run_distributed(TRAIN[case.sharded, case.overlapped], leg.ranks, values)
        ended = json.loads((start / "run" / name / "finished.json").read_text())
        reason = "trainer.max_steps of 9 steps" if leg.stop else "the curriculum's end"
        assert ended == {"step": leg.stop or 9, "reason": reason}
    return rows(start, name)


@pytest.fixture(scope="module")
def uninterrupted(start):
    return ran(start, "fp32")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reference != name])
def test_it_goes_on_as_if_nothing_had_been(start, name):
    case, found, expected = CASES[name], ran(start, name), ran(start, CASES[name].reference)
    assert list(found) == list(expected) == list(range(1, 10))
    for step, row in expected.items():
        assert found[step].keys() >= row.keys()  # an early end validates once more
        for value in case.names or row:
            if value in row or step == 9:
                near = pytest.approx(row[value], rel=case.within, abs=case.within and 1e-7)
                assert found[step][value] == near, f"{value} at step {step}"


def test_a_bf16_checkpoint_holds_fp32_weights_of_what_is_not_fp32(start):
    ran(start, "bf16_again")
    keys = read_metadata(list_checkpoints(start / "run" / "bf16_again")[-1]).state_dict_metadata
    copies = [key for key in keys if key.startswith("optimizer.state.fp32_param.")]
    assert len(copies) > 10 and not [name for name in copies if name.endswith(("A_log", ".D"))]


def test_a_checkpoint_between_two_steps_waits_for_the_weights(start):
    """The last one by itself would not show it: a validation before it waits."""
    names, held = ("sharded_bf16", "sharded_bf16_overlapped"), []
    for name in names:
        ran(start, name)
        folders = list_checkpoints(start / "run" / name)
        assert [folder.name for folder in folders] == ["step_00000006", "step_00000009"]
        held.append([StoredTensors(folder, Record.read(folder).shape) for folder in folders])
    for plain, overlapped in zip(*held, strict=True):
        assert all(torch.equal(plain[parameter], overlapped[parameter]) for parameter in plain)


def test_the_distributed_optimizer_saves_whole_tensors_whatever_the_rank(start):
    ran(start, "sharded_bf16_again")
    metadata = read_metadata(list_checkpoints(start / "run" / "sharded_bf16_again")[-1]).state_dict_metadata
    weights = {key for key in metadata if key.startswith(("decoder.", "embedding.", "output_layer."))}
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        held = {
            key.removeprefix(f"optimizer.state.{kind}."): metadata[key].size for key in metadata if f"e.{kind}." in key
        }
        assert held.keys() == weights and all(metadata[key].size == size for key, size in held.items())


def gathered_for_saves(values):
    """Train sharded; returns whether this rank held the whole optimizer state at each save."""
    held, gather = [], DistributedOptimizer.get_parameter_state_dp_zero

    def gathered(*args, **kwargs):
        found = gather(*args, **kwargs)
        held.append(found is not None)
        return found

    with mock.patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", gathered):
        train_fused(values)
    return held


def test_one_replica_alone_gathers_the_optimizers_state_for_a_save(start):
    """Each rank of 512 that did would take the whole of it, and its GPU two buckets."""
    optim, trainer = dict(use_distributed_optimizer=True), dict(precision="bf16", max_steps=1)
    values = elastic_values(start, "gathered", optim=optim, trainer=trainer)
    assert run_distributed(gathered_for_saves, 2, values) == [[True], [False]]


def skip_all(values):
    """Train as if every gradient had a NaN in it."""
    with mock.patch.object(SkippedSteps, "nonfinite", lambda *arguments: ["losses"]):
        train(values)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_from_before_the_first_step_is_gone_on_with(start, precision):
    version, trainer = f"no_step_{precision}", dict(precision=precision, max_steps=2)
    run_distributed(skip_all, 1, elastic_values(start, version, trainer=trainer))
    run_distributed(train, 1, elastic_values(start, version, trainer=dict(precision=precision, max_steps=4)))
    assert list(rows(start, version)) == [1, 2, 3, 4]


def train_and_be_killed_behind_the_save(values, step):
    save = SaveCheckpoints.after_step

    def killed(self, trainer, result):
        save(self, trainer, result)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(SaveCheckpoints, "after_step", killed):
        train(values)


def test_killed_the_moment_a_checkpoint_is_whole_the_row_of_its_step_is_there(start, uninterrupted):
    values = split_values(start, "behind", trainer=dict(checkpoint_every_n_steps=3))
    with pytest.raises(DistributedRunError):
        run_distributed(train_and_be_killed_behind_the_save, 1, values, 3)
    run_distributed(train, 1, values)
    assert rows(start, "behind") == uninterrupted


def test_two_killed_replicas_resume_to_the_last_digit(start):
    values = split_values(start, "killed_pair")
    with pytest.raises(DistributedRunError):
        run_distributed(train_and_be_killed, 2, values, "step_00000003", 4)
    before = rows(start, "killed_pair")
    assert 4 in before and 9 not in before
    assert list_checkpoints(start / "run" / "killed_pair")[0].name == "step_00000003"
    run_distributed(train, 2, values)
    assert rows(start, "killed_pair") == ran(start, "fp32_dp2")
    written = [json.loads(line) for line in (start / "run" / "killed_pair" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written if "grad_norm" in row] == list(range(1, 10))  # none twice


def test_a_signal_ends_the_run_with_a_checkpoint_and_the_same_command_goes_on(start, uninterrupted):
    values = split_values(start, "told", trainer=dict(checkpoint_every_n_steps=100))
    run_distributed(train_and_be_told_to_stop, 1, values, 2)
    stopped_after = max(rows(start, "told"))
    assert 2 <= stopped_after < 9
    assert [path.name for path in list_checkpoints(start / "run" / "told")] == [f"step_{stopped_after:08d}"]
    run_distributed(train, 1, values)
    assert rows(start, "told") == uninterrupted


class StopAfter(Callback):
    """Tells a run to stop after a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer, result):
        if trainer.step == self.step:
            trainer.stop_reason = "a test"


def train_until(values, step):
    run_training(load(ElasticConfig, values), Console(quiet=True), [StopAfter(step)])


def test_a_stop_between_two_log_points_loses_no_step_of_the_log(start, uninterrupted):
    values = split_values(start, "between", trainer=dict(log_every_n_steps=3))
    run_distributed(train_until, 1, values, 4)
    found = rows(start, "between")
    assert list(found) == [3, 4]
    losses = [name for name in uninterrupted[4] if name.startswith("train/")]
    assert losses and {name: found[4][name] for name in losses} == {name: uninterrupted[4][name] for name in losses}
    run_distributed(train, 1, values)
    assert list(rows(start, "between")) == [3, 4, 6, 9]
