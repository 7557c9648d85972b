"""A run's house-keeping: changes and budgets of a run that goes on, every sample once, and what ranks must agree on."""

import json
import os
from collections import defaultdict
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.state import load_router, read_training_state
from elastic.config.load import load
from elastic.config.sections import DistillConfig, OptimConfig
from elastic.config.verbs import ElasticConfig
from elastic.data import stream
from elastic.data.stream import Concatenated, read_batch
from elastic.data.tokens import TokenStream
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.router.router import Router
from elastic.run import folder as folder_module
from elastic.run.changes import ResumeError
from elastic.run.folder import RunFolderError, run_lock
from elastic.space.gates import Gates
from elastic.train.evaluation import LossMeter
from elastic.train.optimizer import build_optimizer, wrap_for_training
from elastic.train.pipeline import PipelineRunner
from elastic.train.trainer import Callback
from elastic.verbs.training import run_training
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import MICRO_BATCH, SEQUENCE, LayoutCase, batch, tiny_space
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import (
    BUDGETS,
    CURRICULUM,
    SPLIT_ELASTIC,
    elastic_values,
    rows,
    split_values,
    tiny_run_space,
    train,
    train_and_be_killed,
)
from tests.parity.model_factory import relative_error
from tests.shapes import random_choice

FOUR = dict(tensor=2, pipeline=2, sequence=True, recompute="full")


def test_changes_are_refused_before_anything_is_touched_and_recorded_when_accepted(start):
    run_distributed(train, 1, split_values(start, "changes", trainer=dict(max_steps=4)))
    folder = start / "run" / "changes"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    budgets = [BUDGETS[0], dict(name="third", ratio=0.8), BUDGETS[1]]
    curriculum = [dict(CURRICULUM[0], steps=6), *CURRICULUM[1:]]
    changed = dict(elastic=dict(SPLIT_ELASTIC, budgets=budgets), curriculum=curriculum, trainer=dict(max_steps=5))
    with pytest.raises(DistributedRunError) as refused:
        run_distributed(train, 2, split_values(start, "changes", seed=99, **changed))
    assert isinstance(refused.value.__cause__, ResumeError)
    for part in ("3 differences", "seed = 99", "accept_changes=[elastic.budgets,curriculum.0.steps]", "third"):
        assert part in str(refused.value.__cause__)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    accepted = dict(accept_changes=["elastic.budgets", "curriculum.0.steps"])
    values = split_values(start, "changes", **changed)
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


class Told(Callback):
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
        with log.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        return batch

    with mock.patch.object(stream, "read_batch", write_down):
        rank_function(*arguments)


def train_and_be_told(values, step):
    run_training(load(ElasticConfig, values), Console(quiet=True), [Told(step)])


def test_each_sample_of_an_epoch_once_over_three_interruptions_and_dp_1_2_1(start, tmp_path):
    """A phase counts its samples from 0 and orders them anew each epoch; the next phase starts its own count."""
    data = dict(path=str(start / "data"), micro_batch=8, validation_sequences=16)
    phases = [dict(CURRICULUM[0], global_batch=64, steps=7), dict(CURRICULUM[1], global_batch=32, steps=2)]
    router = dict(SPLIT_ELASTIC["router"], draws_per_step=2, noise_draws_per_step=2)
    common = dict(data=data, curriculum=phases, elastic=dict(SPLIT_ELASTIC, router=router))
    values = split_values(start, "counted", **common, trainer=dict(checkpoint_every_n_steps=2))
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
        num_chunks = len(Concatenated(TokenStream(start / "data" / "train"), length, 0))
        epoch = [chunk_of[length, sample] for sample in range(min(total, num_chunks))]
        assert len(set(epoch)) == len(epoch), "a chunk twice in one epoch"
        assert total < num_chunks or sorted(epoch) == list(range(num_chunks))
    assert phases[0]["global_batch"] * 7 > len(Concatenated(TokenStream(start / "data" / "train"), 32, 0))


class Groups(Callback):
    """Checks what the model's and the router's Adam compute with."""

    def __init__(self, optim):
        self.optim = optim

    def on_start(self, trainer):
        groups = trainer.optimizer.param_groups
        assert {group["weight_decay"] for group in groups} == {0.0, self.optim["weight_decay"]}
        for group in (*groups, *trainer.router_optimizer.param_groups):
            assert tuple(group["betas"]) == (0.9, self.optim["adam_beta2"]) and group["eps"] == self.optim["eps"]


def train_and_look(values, optim):
    run_training(load(ElasticConfig, values), Console(quiet=True), [Groups(optim)])


def test_accepted_settings_of_the_optimizer_are_those_it_computes_with(start):
    run_distributed(train, 1, elastic_values(start, "settings", trainer=dict(max_steps=3)))
    optim = dict(weight_decay=0.3, adam_beta2=0.9, eps=1e-6)
    values = elastic_values(start, "settings", optim=optim, trainer=dict(max_steps=4))
    values["exp_manager"]["accept_changes"] = [f"optim.{name}" for name in optim]
    run_distributed(train_and_look, 1, values, optim)
    assert list(rows(start, "settings")) == [1, 2, 3, 4]


def hold_twice(folder):
    here = join_world(Layout(), torch.device("cpu"))
    with run_lock(folder, here):
        refused = pytest.raises(RunFolderError, match=rf"another run writes there \(process {os.getpid()} on ")
        with mock.patch.object(folder_module, "LOCK_WAIT_S", 0.1), refused, run_lock(folder, here):
            pass
    with run_lock(folder, here):
        return True


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    assert run_distributed(hold_twice, 1, tmp_path / "run" / "version_0") == [True]


class KeepRouter(Callback):
    """Takes the router's weights and the subnets it chose off every rank at the end of a run."""

    def on_end(self, trainer):
        self.weights = {name: tensor.clone() for name, tensor in trainer.chooser.router.state_dict().items()}
        self.subnets = [(subnet.hidden, subnet.ffn, subnet.kept_layers) for subnet in trainer.chosen_subnets().values()]


def train_and_keep_router(values):
    kept = KeepRouter()
    run_training(load(ElasticConfig, values), Console(quiet=True), [kept])
    return kept.weights, kept.subnets


def test_pitfall_15_16_all_ranks_hold_the_same_router_and_decide_alike(start):
    values = elastic_values(start, "router", parallel=FOUR, trainer=dict(max_steps=5))
    ranks = run_distributed(train_and_keep_router, 4, values)
    weights, subnets = ranks[0]
    for other, other_subnets in ranks[1:]:
        assert other_subnets == subnets
        assert all(torch.equal(other[name], tensor) for name, tensor in weights.items())
    saved = load_file(list_checkpoints(start / "run" / "router")[-1] / "router.safetensors")
    assert all(torch.equal(saved[f"router/{name}"], tensor) for name, tensor in weights.items())
    initial = Router(tiny_run_space(), 2, 16, seed=1234).state_dict()
    assert any(not torch.equal(initial[name], tensor) for name, tensor in weights.items()), "it never trained"


def step_in_order(numbers):
    """Run a step's micro-batches in a given order, in fp64; return each one's loss and the gradients."""
    space, layout = tiny_space(), Layout(pipeline=2, dtype=torch.float64)
    here = join_world(layout, torch.device("cpu"))
    student, teacher = (build_model(space, layout, seed=seed, init_std=0.3) for seed in (1, 2))
    wrapped = wrap_for_training(student, OptimConfig())
    build_optimizer(wrapped, OptimConfig(), here)
    runner = PipelineRunner(here, wrapped, DistillConfig(), teacher.requires_grad_(False))
    draw = torch.Generator().manual_seed(3)
    chosen = [Gates.slice(space.subnet(random_choice(space, draw)), budget=0) for _ in numbers]
    wrapped.zero_grad_buffer()
    work = runner.with_teacher([runner.share(batch(number), chosen[number]) for number in numbers])
    losses = dict(zip(numbers, (float(loss.kl) for loss in runner.forward_backward(work)), strict=False))
    return losses, {name: weight.main_grad.clone() for name, weight in named_global_parameters(student)}


def test_the_order_of_a_steps_micro_batches_changes_the_rounding_of_sums_alone():
    """Slices run in order of budget, so the same samples and budgets must give the same step in any order."""
    as_drawn, ordered = (run_distributed(step_in_order, 2, numbers) for numbers in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]))
    assert as_drawn[1][0].keys() == {0, 1, 2, 3, 4}
    for (losses, gradients), (other_losses, others) in zip(as_drawn, ordered, strict=True):
        assert losses == pytest.approx(other_losses, rel=1e-11)
        for name, gradient in gradients.items():
            assert gradient.dtype is torch.float64 and gradient.abs().max() > 0
            assert relative_error(others[name], gradient) <= 1e-11, name


def losses_by_label():
    """Return mean KL by budget row when student and teacher are the same model and one micro-batch runs a subnet."""
    space = tiny_space()
    case = LayoutCase("one", Layout())
    here = join_world(case.layout, torch.device("cpu"))
    student, teacher = (build_model(space, case.layout, seed=1, init_std=0.3) for _ in range(2))
    runner = PipelineRunner(here, student, DistillConfig(), teacher)
    small = space.subnet({axis: (1,) * space.num_slots(axis) for axis in space.elastic_axes()})
    choices = [Gates.slice(small, budget=1), Gates.slice(space.subnet({}), budget=0)]
    work = runner.with_teacher([runner.share(batch(g), gates) for g, gates in enumerate(choices)])
    meter = LossMeter(2, here.device)
    meter.add(runner.forward_backward(work))
    return [(mean.kl, mean.num_tokens) for mean in meter.read(here)]


def test_pitfall_24_losses_are_filed_under_the_budget_that_was_drawn():
    """A label guessed from a loss of zero would call the subnet full whenever the student equals the teacher."""
    ((full_kl, full_tokens), (small_kl, small_tokens)) = run_distributed(losses_by_label, 1)[0]
    assert abs(full_kl) < 1e-9 < 1e-3 < small_kl
    assert full_tokens == small_tokens == SEQUENCE * MICRO_BATCH
