"""NaN and Inf: wherever one arises, no rank takes the step, all say so alike, and the file names what caused it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from rich.console import Console

from elastic.checkpoint.find import list_checkpoints
from elastic.config.load import load
from elastic.config.sections import OptimConfig
from elastic.config.verbs import ElasticConfig
from elastic.model.model import build_model
from elastic.train.nonfinite import NonFiniteError
from elastic.train.optimizer import (
    apply_gradients,
    build_optimizer,
    gradient_norm,
    set_learning_rate,
    wrap_for_training,
)
from elastic.train.pipeline import PipelineRunner
from elastic.train.trainer import Callback
from elastic.verbs.training import run_training
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import tiny_space
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import CURRICULUM, elastic_values, rows, train

FOUR = dict(tensor=2, pipeline=2, sequence=True, recompute="full")
NAN, INF = math.nan, math.inf


class PoisonedRunner(PipelineRunner):
    """Puts one bad number into one step on this rank: `deeds` maps a step (from 1) to where it goes."""

    def __init__(self, trainer, deeds):
        healthy = trainer.runner
        super().__init__(healthy.world, healthy.student, healthy.loss, healthy.teacher)
        self.trainer, self.deeds = trainer, deeds

    def deed(self):
        return self.deeds.get(self.trainer.step + 1)

    def with_teacher(self, micro_batches):
        work = super().with_teacher(micro_batches)
        if self.deed() == "teacher":
            states = work[1].teacher_hidden.clone()
            states.view(-1)[5] = NAN
            work[1] = replace(work[1], teacher_hidden=states)
        if self.deed() == "loud":
            work = [replace(batch, teacher_hidden=batch.teacher_hidden * 10) for batch in work]
        return work

    def forward_backward(self, micro_batches, **how):
        losses = super().forward_backward(micro_batches, **how)
        if self.deed() == "weight":
            # A norm's weight: on tensor-parallel rank 1 a copy, which the gradient norm does not count.
            *_, last = self.student_model.parameters()
            last.main_grad.view(-1)[0] = INF
        if self.deed() == "gate":
            leaf = next(iter(micro_batches[0].gates.weights.values()))
            leaf.grad[0, 0] = NAN
        return losses


class PoisonAndWatch(Callback):
    """Installs the runner on one rank a deed, and keeps copies of everything trained after every step."""

    def __init__(self, deeds):
        self.deeds = deeds
        self.skipped, self.states = [], []

    def on_start(self, trainer):
        rank = torch.distributed.get_rank()
        trainer.runner = PoisonedRunner(
            trainer, {step: deed for step, (who, deed) in self.deeds.items() if who == rank}
        )

    def after_step(self, trainer, result):
        self.skipped.append(result.skipped)
        self.states.append(trained_tensors(trainer))


def trained_tensors(trainer):
    """Return copies of weights, router, and both Adam states, by kind."""
    (part,) = trainer.optimizer.chained_optimizers
    adam = [value for state in part.optimizer.state.values() for value in state.values()]
    router_adam = [value for state in trainer.router_optimizer.state.values() for value in state.values()]
    kinds = dict(
        weights=list(trainer.runner.student_model.parameters()),
        adam=adam,
        router=list(trainer.chooser.router.parameters()),
        router_adam=router_adam,
    )
    return {kind: [tensor.detach().clone() for tensor in tensors] for kind, tensors in kinds.items()}


def train_poisoned(values, deeds):
    watch = PoisonAndWatch(deeds)
    run_training(load(ElasticConfig, values), Console(quiet=True), [watch])
    moved = []
    for before, after in zip(watch.states, watch.states[1:], strict=False):
        moved.append({kind for kind in after if not same(before[kind], after[kind])})
    return watch.skipped, moved, watch.states[-1]["router"]


def same(before, after):
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def dumps(start: Path, version: str, step: int):
    """Return the files about one step by rank."""
    files = sorted((start / "run" / version / "nonfinite").glob(f"step_{step:08d}_rank_*.json"))
    return {int(file.stem.rpartition("_")[2]): json.loads(file.read_text()) for file in files}


def suspects(dump):
    return [entry["sample_ids"] for entry in dump["micro_batches"] if entry["suspect"]]


SKIPPED = [False, True, False, True, True, False, True, False, False]


@pytest.fixture(scope="module")
def at_dp2(start):
    """A teacher's NaN, a weight's and a gate's gradient, each on one rank of two; later in slice execution."""
    deeds = {2: (1, "teacher"), 4: (0, "weight"), 5: (1, "gate"), 7: (1, "weight")}
    return run_distributed(train_poisoned, 2, elastic_values(start, "poisoned_dp2"), deeds)


@pytest.fixture(scope="module")
def at_tp2_pp2(start):
    """The same steps; ranks 0 and 1 hold the first stage, 2 and 3 the second."""
    deeds = {2: (3, "teacher"), 4: (1, "weight"), 5: (0, "gate"), 7: (2, "weight")}
    values = elastic_values(start, "poisoned_four", parallel=FOUR, trainer=dict(loss_spike_deviations=None))
    return run_distributed(train_poisoned, 4, values, deeds)


@pytest.mark.parametrize("layout", ["at_dp2", "at_tp2_pp2"])
def test_no_rank_takes_a_bad_step_and_all_take_the_others(layout, request):
    ranks = request.getfixturevalue(layout)
    for skipped, moved, router in ranks:
        assert skipped == SKIPPED
        for step, (bad, kinds) in enumerate(zip(SKIPPED[1:], moved, strict=True), start=2):
            everything = {"weights", "adam", "router", "router_adam"} if step <= 5 else {"weights", "adam"}
            assert kinds == (set() if bad else everything), f"step {step}"
        assert same(router, ranks[0][2])


@pytest.mark.usefixtures("at_dp2", "at_tp2_pp2")
def test_bad_steps_count_as_steps_and_leave_no_trace_in_the_numbers(start):
    """Data, draws and schedules go on: both layouts left out the same steps, so they log the same numbers."""
    found, expected = rows(start, "poisoned_four"), rows(start, "poisoned_dp2")
    assert [found[step]["skipped_steps"] for step in range(1, 10)] == [0, 1, 1, 2, 3, 3, 4, 4, 4]
    for step in range(1, 10):
        for name, value in expected[step].items():
            if name != "grad_norm" or not SKIPPED[step - 1]:
                assert found[step][name] == pytest.approx(value, rel=1e-5, abs=1e-7), f"{name} at step {step}"
    assert not any(name.startswith("train/") for name in found[2])
    events = [json.loads(line) for line in (start / "run" / "poisoned_four" / "events.jsonl").read_text().splitlines()]
    skipped = [event["step"] for event in events if event["event"] == "skipped_step"]
    assert skipped == [2, 4, 5, 7]


@pytest.mark.usefixtures("at_dp2")
def test_the_replica_that_saw_it_names_its_micro_batch(start):
    # Step 2 of 8 samples, two a micro-batch: micro-batch 1 of replica 1 is the step's fourth.
    by_rank = dumps(start, "poisoned_dp2", 2)
    assert set(by_rank) == {0, 1}
    assert suspects(by_rank[0]) == [] and suspects(by_rank[1]) == [[8 + 6, 8 + 7]]
    bad = by_rank[1]["micro_batches"][1]
    assert bad["kl"] == "nan" and math.isfinite(bad["cross_entropy"])
    assert bad["budget"] in ("full", "half") and set(bad["gates"]) >= {"hidden", "ffn", "depth"}
    assert all(abs(sum(row) - 1) < 1e-5 for axis in bad["gates"].values() for row in axis)
    assert by_rank[1]["not_finite"] == ["losses", "gradients", "router gradients"]
    # Summed over replicas, the gradient is bad in both; the first speaks for them.
    assert by_rank[0]["num_nonfinite_gradients"] > 8 == len(by_rank[0]["nonfinite_gradients"])


@pytest.mark.usefixtures("at_dp2")
def test_a_bad_gate_gradient_is_found_before_the_router_is_lost(start):
    by_rank = dumps(start, "poisoned_dp2", 5)
    assert by_rank[0]["not_finite"] == ["router gradients"] and suspects(by_rank[0]) == []
    assert suspects(by_rank[1]) == [[32 + 2, 32 + 3]]
    assert len(by_rank[1]["micro_batches"][0]["nonfinite_gate_gradients"]) == 1


@pytest.mark.usefixtures("at_dp2", "at_tp2_pp2")
def test_a_bad_weight_gradient_is_named_with_its_global_layer(start):
    by_rank = dumps(start, "poisoned_four", 4)
    assert by_rank[1]["nonfinite_gradients"] == ["decoder.layers.2.norm.weight"]
    assert by_rank[1]["ranks"] == {"data": 0, "tensor": 1, "pipeline": 0, "context": 0}
    assert set(by_rank) == {0, 1, 2}, "rank 2 reads for the replica, since no micro-batch shows anything"
    sliced = dumps(start, "poisoned_dp2", 7)
    # Nothing says which replica it was: both tell their samples and what ran.
    assert set(sliced) == {0, 1} and all("subnet" in entry for entry in sliced[1]["micro_batches"])


def test_too_many_in_a_row_end_the_run_and_the_last_checkpoint_is_good(start):
    values = elastic_values(start, "given_up", trainer=dict(max_skipped_in_a_row=2))
    deeds = {2: (0, "teacher"), 4: (0, "gate"), 5: (0, "teacher")}
    with pytest.raises(DistributedRunError) as caught:
        run_distributed(train_poisoned, 1, values, deeds)
    error = caught.value.__cause__
    assert isinstance(error, NonFiniteError), "step 2 alone is none in a row"
    assert "trainer.max_skipped_in_a_row = 2" in str(error) and "steps 4, 5" in str(error)
    assert set(dumps(start, "given_up", 5)) == {0}
    assert [path.name for path in list_checkpoints(start / "run" / "given_up")] == ["step_00000003"]
    run_distributed(train, 1, values)
    assert all(math.isfinite(value) for value in rows(start, "given_up")[9].values())
    # Of the attempt before, step 2 stays and what came after the checkpoint is run again.
    assert [rows(start, "given_up")[step]["skipped_steps"] for step in (1, 2, 3, 4, 9)] == [0, 1, 1, 1, 1]


def two_optimizers(dtype, clip_grad):
    """Return weights after Megatron-Core's own step() and after ours in two halves, from the same gradients."""
    here = join_world(Layout(dtype=dtype), torch.device("cpu"))
    results, norms = [], []
    for whole in (True, False):
        model = build_model(tiny_space(), here.layout, seed=1, init_std=0.3)
        wrapped = wrap_for_training(model, OptimConfig())
        optimizer = build_optimizer(wrapped, OptimConfig(clip_grad=clip_grad, weight_decay=0.1), here)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            for parameter in model.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            set_learning_rate(optimizer, 1e-2)
            if whole:
                updated, norm, _ = optimizer.step()
                assert updated
            else:
                norm = gradient_norm(optimizer, here.device)
                apply_gradients(optimizer, norm)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
        norms.append(float(norm))
    return norms, results


@pytest.mark.parametrize(("dtype", "clip_grad"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 0.0)])
def test_the_two_halves_of_the_optimizers_step_are_its_step(dtype, clip_grad):
    (whole_norm, our_norm), (whole, ours) = run_distributed(two_optimizers, 1, dtype, clip_grad)[0]
    assert our_norm == whole_norm > 1.0
    assert same(whole, ours)


def test_a_loss_that_stands_out_is_reported_with_its_samples(start):
    """Another teacher for one step: finite, so the step is taken, but far from the ten values logged before."""
    trainer = dict(log_every_n_steps=2, checkpoint_every_n_steps=100)
    curriculum = [{**CURRICULUM[0], "steps": 26}]
    values = elastic_values(start, "spikes", curriculum=curriculum, trainer=trainer, data=dict(micro_batch=1))
    run_distributed(train_poisoned, 1, values, {23: (0, "loud")})
    logged = rows(start, "spikes")
    events = [json.loads(line) for line in (start / "run" / "spikes" / "events.jsonl").read_text().splitlines()]
    events = [event for event in events if event["event"] == "loss_spike"]
    assert [(event["event"], event["step"], event["name"]) for event in events] == [
        ("loss_spike", 24, "full"),
        ("loss_spike", 24, "half"),
    ]
    for event in events:
        past = [logged[step][f"train/{event['name']}/kl"] for step in range(2, 24, 2)]
        assert event["loss"] == logged[24][f"train/{event['name']}/kl"] > event["usual"] == pytest.approx(median(past))
        # Steps 23 and 24 of 8 samples each.
        assert (event["phase"], event["first_step"], event["samples"]) == ("short", 23, [176, 191])
        assert event["deviations"] > 8
