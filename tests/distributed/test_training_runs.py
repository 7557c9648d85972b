"""Resume: exact at the same layout, equal at another; and what all ranks must agree on."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from elastic.checkpoint.find import list_checkpoints
from elastic.config.load import load
from elastic.config.sections import DistillConfig
from elastic.config.training import ElasticConfig
from elastic.model.model import Layout, build_model
from elastic.router.router import Router
from elastic.space.gates import Gates
from elastic.train.callbacks import NoCallback
from elastic.train.metrics import LossMeter
from elastic.train.pipeline import PipelineRunner
from elastic.verbs.training import run_elastic
from elastic.world.groups import join_world
from tests.distributed.elastic_step import MICRO_BATCH, SEQUENCE, LayoutCase, batch, tiny_space
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import (
    elastic_values,
    rows,
    tiny_run_space,
    train,
    train_and_be_killed,
    train_and_be_told_to_stop,
)

FOUR = dict(tensor=2, pipeline=2, sequence=True, recompute="full")


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
    assert list_checkpoints(start / "run" / "killed")[0].name == "step_00000003"
    run_distributed(train, 1, values)
    assert rows(start, "killed") == uninterrupted


def test_two_killed_replicas_resume_to_the_last_digit(start):
    run_distributed(train, 2, elastic_values(start, "pair"))
    values = elastic_values(start, "killed_pair")
    with pytest.raises(DistributedRunError):
        run_distributed(train_and_be_killed, 2, values, "step_00000003", 4)
    run_distributed(train, 2, values)
    assert rows(start, "killed_pair") == rows(start, "pair")


def test_a_signal_ends_the_run_with_a_checkpoint_and_the_same_command_goes_on(start, uninterrupted):
    values = elastic_values(start, "told", trainer=dict(checkpoint_every_n_steps=100))
    run_distributed(train_and_be_told_to_stop, 1, values, 2)
    stopped_after = max(rows(start, "told"))
    assert 2 <= stopped_after < 9
    assert [path.name for path in list_checkpoints(start / "run" / "told")] == [f"step_{stopped_after:08d}"]
    run_distributed(train, 1, values)
    assert rows(start, "told") == uninterrupted


class StopAfter(NoCallback):
    """Tells a run to stop after a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer, result):
        if trainer.step == self.step:
            trainer.stop_reason = "a test"


def train_until(values, step):
    run_elastic(load(ElasticConfig, values), Console(quiet=True), [StopAfter(step)])


def test_a_stop_between_two_log_points_loses_no_step_of_the_log(start, uninterrupted):
    values = elastic_values(start, "between", trainer=dict(log_every_n_steps=3))
    run_distributed(train_until, 1, values, 4)
    found = rows(start, "between")
    assert list(found) == [3, 4]
    losses = [name for name in uninterrupted[4] if name.startswith("train/")]
    assert losses and {name: found[4][name] for name in losses} == {name: uninterrupted[4][name] for name in losses}
    run_distributed(train, 1, values)
    assert list(rows(start, "between")) == [3, 4, 6, 9]


class KeepRouter(NoCallback):
    """Takes the router's weights and the subnets it chose off every rank at the end of a run."""

    def on_end(self, trainer):
        self.weights = {name: tensor.clone() for name, tensor in trainer.chooser.router.state_dict().items()}
        self.subnets = [(subnet.hidden, subnet.ffn, subnet.kept_layers) for subnet in trainer.chosen_subnets().values()]


def train_and_keep_router(values):
    kept = KeepRouter()
    run_elastic(load(ElasticConfig, values), Console(quiet=True), [kept])
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
    meter = LossMeter(2, here)
    meter.add(runner.forward_backward(work))
    return [(mean.kl, mean.num_tokens) for mean in meter.read()]


def test_pitfall_24_losses_are_filed_under_the_budget_that_was_drawn():
    """A label guessed from a loss of zero would call the subnet full whenever the student equals the teacher."""
    ((full_kl, full_tokens), (small_kl, small_tokens)) = run_distributed(losses_by_label, 1)[0]
    assert abs(full_kl) < 1e-9 < 1e-3 < small_kl
    assert full_tokens == small_tokens == SEQUENCE * MICRO_BATCH
