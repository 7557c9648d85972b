"""Going on: another micro-batch split, phase boundaries, accepted changes, and every sample exactly once."""

import json
import os
import signal
from collections import defaultdict
from unittest import mock

import pytest
import torch
from rich.console import Console

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.state import load_router, read_training_state
from elastic.config.load import load
from elastic.config.training import ElasticConfig
from elastic.data import phases as phase_data
from elastic.data.stream import PackedSequences, TokenStream, read_batch
from elastic.model.model import Layout
from elastic.router.router import Router
from elastic.run.folder import RunFolderError, run_lock
from elastic.run.resume import ResumeError
from elastic.train.callbacks import NoCallback
from elastic.train.save_checkpoints import SaveCheckpoints
from elastic.verbs.training import run_elastic
from elastic.world.groups import join_world
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import (
    BUDGETS,
    CURRICULUM,
    DRAWS_PER_STEP,
    SPACE,
    elastic_values,
    rows,
    tiny_run_space,
    train,
    train_and_be_killed,
)

SPLIT_ELASTIC = dict(
    space=SPACE,
    budgets=BUDGETS,
    router=dict(draws_per_step=DRAWS_PER_STEP, noise_draws_per_step=DRAWS_PER_STEP, hidden_width=16),
)


def family(start, version, **overrides):
    """Return values whose gates do not depend on the micro-batch; the first phase gives its length in tokens."""
    curriculum = [dict(CURRICULUM[0], steps=None, tokens=5 * 8 * 32), CURRICULUM[1]]
    return elastic_values(start, version, **{"elastic": SPLIT_ELASTIC, "curriculum": curriculum, **overrides})


@pytest.fixture(scope="module")
def uninterrupted(start):
    run_distributed(train, 1, family(start, "split_uninterrupted"))
    return rows(start, "split_uninterrupted")


def test_stopped_at_the_boundary_of_two_phases_and_resumed_to_the_last_digit(start, uninterrupted):
    run_distributed(train, 1, family(start, "boundary", trainer=dict(max_steps=5)))
    folder = start / "run" / "boundary"
    assert json.loads((folder / "finished.json").read_text()) == {"step": 5, "reason": "trainer.max_steps of 9 steps"}
    run_distributed(train, 1, family(start, "boundary"))
    assert json.loads((folder / "finished.json").read_text()) == {"step": 9, "reason": "the curriculum's end"}
    found = rows(start, "boundary")
    assert {step: {k: v for k, v in found[step].items() if k in row} for step, row in uninterrupted.items()} == (
        uninterrupted
    )


def train_and_be_killed_behind_the_save(values, step):
    save = SaveCheckpoints.after_step

    def killed(self, trainer, result):
        save(self, trainer, result)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(SaveCheckpoints, "after_step", killed):
        train(values)


def test_killed_the_moment_a_checkpoint_is_whole_the_row_of_its_step_is_there(start, uninterrupted):
    values = family(start, "behind", trainer=dict(checkpoint_every_n_steps=3))
    with pytest.raises(DistributedRunError):
        run_distributed(train_and_be_killed_behind_the_save, 1, values, 3)
    run_distributed(train, 1, values)
    assert rows(start, "behind") == uninterrupted


def test_resumed_with_another_micro_batch_and_two_replicas_the_losses_are_the_same(start, uninterrupted):
    run_distributed(train, 1, family(start, "split", trainer=dict(max_steps=2)))
    data = dict(path=str(start / "data"), micro_batch=2, validation_sequences=4)
    run_distributed(train, 1, family(start, "split", data=data, trainer=dict(max_steps=7)))
    run_distributed(train, 2, family(start, "split"))
    for step, row in uninterrupted.items():
        for name, value in row.items():
            assert rows(start, "split")[step][name] == pytest.approx(value, rel=1e-5, abs=1e-7), f"{name} at {step}"


def test_changes_are_refused_before_anything_is_touched_and_recorded_when_accepted(start):
    run_distributed(train, 1, family(start, "changes", trainer=dict(max_steps=4)))
    folder = start / "run" / "changes"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    budgets = [BUDGETS[0], dict(name="third", ratio=0.8), BUDGETS[1]]
    curriculum = [dict(CURRICULUM[0], steps=6), *CURRICULUM[1:]]
    changed = dict(elastic=dict(SPLIT_ELASTIC, budgets=budgets), curriculum=curriculum, trainer=dict(max_steps=5))
    with pytest.raises(DistributedRunError) as refused:
        run_distributed(train, 2, family(start, "changes", seed=99, **changed))
    assert isinstance(refused.value.__cause__, ResumeError)
    for part in ("3 differences", "seed = 99", "accept_changes=[elastic.budgets,curriculum.0.steps]", "third"):
        assert part in str(refused.value.__cause__)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    accepted = dict(accept_changes=["elastic.budgets", "curriculum.0.steps"])
    values = family(start, "changes", **changed)
    values["exp_manager"] |= accepted
    run_distributed(train, 1, values)
    newest = list_checkpoints(folder)[-1]
    state = read_training_state(newest)
    assert state is not None and state.step == 5
    assert [(change["step"], change["field"]) for change in state.origin["changes"]] == [
        (4, "elastic.budgets"),
        (4, "curriculum.0.steps"),
    ]
    assert "router/third/cost_ratio" in rows(start, "changes")[5]
    # The same command goes on after the next interruption, with nothing left to accept.
    values["trainer"] = dict(values["trainer"], max_steps=6)
    run_distributed(train, 1, values)


def test_a_new_budget_starts_fresh_and_the_others_keep_what_they_learnt(start):
    checkpoint = list_checkpoints(start / "run" / "changes")[-1]
    names = ["full", "third", "half"]
    saved = Router(tiny_run_space(), 3, 16, seed=0)
    load_router(checkpoint, saved, torch.optim.AdamW(saved.parameters()), (names, names))
    router = Router(tiny_run_space(), 3, 16, seed=5)
    fresh, optimizer = router()["hidden"][1].clone(), torch.optim.AdamW(router.parameters())
    column = router.networks["hidden"][0].weight[:, 1].clone()
    load_router(checkpoint, router, optimizer, (names, ["half", "new", "full"]))
    for axis, logits in router().items():
        assert torch.equal(logits[0], saved()[axis][2]) and torch.equal(logits[2], saved()[axis][0])
    weight = router.networks["hidden"][0].weight
    assert torch.equal(weight[:, 1], column) and not torch.equal(router()["hidden"][1], fresh)
    moments = optimizer.state[weight]["exp_avg"]
    assert not moments[:, 1].any() and moments[:, 0].any() and moments[:, 2].any()


class Told(NoCallback):
    """Sends this process SIGUSR1 after a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer, result):
        if trainer.step == self.step and trainer.world.is_main:
            os.kill(os.getpid(), 10)


def counted(log, rank_function, *arguments):
    """Call a training function while every micro-batch it reads is written down: phase, place, sample ids, chunks."""

    def write_down(dataset, consumed_samples, *more, **named):
        batch = read_batch(dataset, consumed_samples, *more, **named)
        ids = batch.sample_ids.tolist()
        row = dict(length=dataset.sequence_length, consumed=consumed_samples, ids=ids)
        row["chunks"] = [dataset.order.chunk(sample) for sample in ids]
        with log.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        return batch

    with mock.patch.object(phase_data, "micro_batch", write_down):
        rank_function(*arguments)


def train_and_be_told(values, step):
    run_elastic(load(ElasticConfig, values), Console(quiet=True), [Told(step)])


def test_each_sample_of_an_epoch_once_over_three_interruptions_and_dp_1_2_1(start, tmp_path):
    """A phase counts its samples from 0 and orders them anew each epoch; the next phase starts its own count."""
    data = dict(path=str(start / "data"), micro_batch=8, validation_sequences=16)
    phases = [dict(CURRICULUM[0], global_batch=64, steps=7), dict(CURRICULUM[1], global_batch=32, steps=2)]
    router = dict(SPLIT_ELASTIC["router"], draws_per_step=2, noise_draws_per_step=2)
    common = dict(data=data, curriculum=phases, elastic=dict(SPLIT_ELASTIC, router=router))
    values = family(start, "counted", **common, trainer=dict(checkpoint_every_n_steps=2))
    logs = [tmp_path / f"{attempt}.jsonl" for attempt in range(4)]
    run_distributed(counted, 1, logs[0], train_and_be_told, values, 1)
    with pytest.raises(DistributedRunError):
        run_distributed(counted, 2, logs[1], train_and_be_killed, values, "step_00000002", 3)
    run_distributed(counted, 1, logs[2], train_and_be_told, values, 5)
    run_distributed(counted, 2, logs[3], train, values)
    assert [step for step in sorted(rows(start, "counted"))] == list(range(1, 10))
    # What an attempt read past the checkpoint the next one starts from is lost; where both read, they must agree.
    counts: dict[tuple[int, int], list[int]] = {}
    chunk_of: dict[tuple[int, int], int] = {}
    for log in logs:
        attempt = defaultdict(list)
        for row in map(json.loads, log.read_text().splitlines()):
            attempt[row["length"], row["consumed"]] += row["ids"]
            for sample, chunk in zip(row["ids"], row["chunks"], strict=True):
                assert chunk_of.setdefault((row["length"], sample), chunk) == chunk
        counts = {place: ids for place, ids in counts.items() if place < min(attempt)} | attempt
    for phase in phases:
        length, total = phase["sequence_length"], phase["global_batch"] * phase["steps"]
        ids = sorted(sample for (at, _), samples in counts.items() if at == length for sample in samples)
        assert ids == list(range(total)), f"phase {phase['name']}"
        num_chunks = len(PackedSequences(TokenStream(start / "data" / "train"), length, 0))
        epoch = [chunk_of[length, sample] for sample in range(min(total, num_chunks))]
        assert len(set(epoch)) == len(epoch), "a chunk twice in one epoch"
        assert total < num_chunks or sorted(epoch) == list(range(num_chunks))
    assert phases[0]["global_batch"] * 7 > len(PackedSequences(TokenStream(start / "data" / "train"), 32, 0))


def hold_twice(folder):
    here = join_world(Layout(), torch.device("cpu"))
    with run_lock(folder, here):
        refused = pytest.raises(RunFolderError, match=rf"another run writes there \(process {os.getpid()} on ")
        with refused, run_lock(folder, here, wait_s=0.1):
            pass
    with run_lock(folder, here):
        return True


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    assert run_distributed(hold_twice, 1, tmp_path / "run" / "version_0") == [True]
