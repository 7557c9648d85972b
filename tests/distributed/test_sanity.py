"""debug.sanity: one changed bit on one rank is named with its tensor and rank; healthy runs pass and train the same."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from elastic.checkpoint.state import Trainable
from elastic.config.load import load
from elastic.config.verbs import ElasticConfig
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.router.phases import Moment, Phase
from elastic.router.router import Router
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.train.sanity import Sanity, SanityError
from elastic.train.trainer import Callback
from elastic.verbs.training import run_training
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import batch, tiny_space
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import CURRICULUM, elastic_values, rows, train

ROUTER = "networks.ffn.2.weight"
FOUR = dict(tensor=2, pipeline=2, sequence=True, recompute="full")


def flip_lowest_bit(tensor):
    """Change one value by its last bit."""
    bits = tensor.detach().view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    bits[bits.numel() // 2] ^= 1


class Copies:
    """A model, a router and the gates of one step at some layout, with nothing trained."""

    def __init__(self, layout, tied):
        space = tiny_space()
        space = replace(space, parent=replace(space.parent, tied_embeddings=tied))
        self.world = join_world(layout, torch.device("cpu"))
        model = build_model(space, layout, seed=1, init_std=0.3)
        router = Router(space, 2, 16, seed=1)
        optimizer = torch.optim.AdamW(router.parameters())
        sum(p.sum() for p in router.parameters()).backward()
        optimizer.step()
        self.sanity = Sanity(Trainable(model, None, router, optimizer), self.world, seed=7)
        self.batches = [batch(self.world.data_rank * 2 + number) for number in range(2)]
        weights = {axis: values[0].detach().softmax(-1) for axis, values in router().items()}
        self.gates = [Gates.mask({axis: w.clone() for axis, w in weights.items()}, budget) for budget in (1, 0)]
        self.tensors = {f"weight {name}": weight for name, weight in named_global_parameters(model)}
        self.tensors |= {f"router weight {name}": weight for name, weight in router.named_parameters()}
        self.tensors |= {
            f"router Adam exp_avg {n}": optimizer.state[p]["exp_avg"] for n, p in router.named_parameters()
        }
        self.tensors["gates ffn of micro-batch 1"] = self.gates[1].weights[Axis.FFN]
        self.tensors["sample ids of micro-batch 0"] = self.batches[0].sample_ids.view(torch.int32)

    def before(self, step):
        phase = Phase(name="only", sequence_length=32, steps=10)
        self.sanity.before_step(Moment(step, 0, phase, step), self.batches, self.gates, (1, 0))

    def after(self, step):
        self.sanity.after_step(Moment(step, 0, Phase(name="only", sequence_length=32, steps=10), step))


def messages(layout, tied, flips):
    """Return what is said of each (tensor, rank, when): changed between two steps, or within one."""
    copies = Copies(layout, tied)
    rank = torch.distributed.get_rank()
    said = []
    copies.before(0)
    for name, where, when in flips:
        copies.after(0)
        if rank == where:
            flip_lowest_bit(copies.tensors[name])
        try:
            copies.before(1) if when == "between" else copies.after(1)
            said.append("nothing")
        except SanityError as error:
            said.append(str(error))
        if rank == where:
            flip_lowest_bit(copies.tensors[name])
    copies.after(0)
    copies.before(1)
    copies.before(2)  # no history: the last check was not after the step before
    return said


def check(num_ranks, layout, tied, cases):
    flips = [case[:3] for case in cases]
    ranks = run_distributed(messages, num_ranks, layout, tied, flips)
    assert all(said == ranks[0] for said in ranks), "all ranks say the same"
    for message, (name, rank, when, over) in zip(ranks[0], cases, strict=True):
        first = message.splitlines()[1].strip()
        assert first.startswith(name), message
        if over is None:
            assert first == f"{name} changed on rank {rank} since the last step"
        else:
            assert f"{name} differs over {over}" in message, message
        if when == "between" and not name.startswith(("gates", "sample")):
            assert f"rank {rank} runs on " in message and message.count(" runs on ") == 1, message


def test_two_replicas():
    weight = "weight decoder.layers.1.mlp.linear_fc1.weight"
    cases = [
        (weight, 1, "between", "data-parallel ranks 0, 1: rank 1 changed since the last step"),
        (weight, 0, "within", "data-parallel ranks 0, 1: as many ranks for one value as for another"),
        (f"router weight {ROUTER}", 0, "between", "all ranks 0, 1: rank 0 changed since the last step"),
        (f"router Adam exp_avg {ROUTER}", 1, "between", "all ranks 0, 1: rank 1 changed since the last step"),
    ]
    check(2, Layout(), False, cases)


def test_tensor_parallel_ranks_of_half_precision():
    cases = [
        ("weight decoder.final_norm.weight", 1, "between", "tensor-parallel ranks 0, 1: rank 1 changed"),
        ("weight decoder.layers.0.norm.weight", 0, "within", "tensor-parallel ranks 0, 1: as many ranks"),
        # A shard has no copy: the rank's own history tells.
        ("weight decoder.layers.0.mixer.in_proj.weight", 1, "between", None),
        ("gates ffn of micro-batch 1", 1, "between", "tensor-parallel ranks 0, 1: as many"),
        ("sample ids of micro-batch 0", 0, "between", "tensor-parallel ranks 0, 1: as many"),
    ]
    check(2, Layout(tensor=2, sequence=True, dtype=torch.bfloat16), False, cases)


def test_a_tied_embedding_on_two_stages():
    cases = [
        (
            "weight embedding.word_embeddings.weight",
            1,
            "between",
            "first and last pipeline stage 0, 1: rank 1 changed since the last step",
        ),
        ("gates ffn of micro-batch 1", 0, "between", "pipeline-parallel ranks 0, 1"),
    ]
    check(2, Layout(pipeline=2), True, cases)


def test_the_majority_of_three_replicas_is_right():
    weight = "weight decoder.final_norm.weight"
    check(3, Layout(), False, [(weight, 2, "within", "data-parallel ranks 0, 1, 2: rank 2 contradicts the others")])


FLIPPED = "decoder.layers.1.mlp.linear_fc1.weight"


class FlipBit(Callback):
    """Changes one bit of one weight, or of what the optimizer keeps of it, on rank 1 after the second step."""

    def __init__(self, what):
        self.what = what

    def after_step(self, trainer, result):
        if trainer.step != 2 or torch.distributed.get_rank() != 1:
            return
        weight = dict(named_global_parameters(trainer.runner.student_model))[FLIPPED]
        if self.what == "weight":
            flip_lowest_bit(weight)
        elif self.what == "main weight":
            flip_lowest_bit(weight.main_param)
        else:
            states = [part.optimizer.state for part in trainer.optimizer.chained_optimizers]
            flip_lowest_bit(next(state[weight]["exp_avg"] for state in states if weight in state))


def train_flipped(values, what):
    run_training(load(ElasticConfig, values), Console(quiet=True), [FlipBit(what)])


@pytest.mark.parametrize(("what", "precision"), [("weight", "fp32"), ("main weight", "bf16"), ("Adam exp_avg", "fp32")])
def test_a_value_silently_changed_on_one_rank_stops_the_run(start, what, precision):
    trainer, version = dict(precision=precision), f"one_bit_{what.replace(' ', '_')}"
    with pytest.raises(DistributedRunError) as caught:
        values = elastic_values(start, version, trainer=trainer, debug=dict(sanity=True))
        run_distributed(train_flipped, 2, values, what)
    error = caught.value.__cause__
    assert isinstance(error, SanityError), str(caught.value)
    name = f"{what} {FLIPPED}"
    assert str(error).startswith("debug.sanity: before step 3 copies differ")
    assert f"{name} differs over data-parallel ranks 0, 1: rank 1 changed since the last step" in str(error)
    assert "last check that passed: after step 2" in str(error)


def test_healthy_runs_pass_and_log_the_same_numbers(start):
    short = dict(curriculum=[{**phase, "steps": 2} for phase in CURRICULUM])  # two of them in slice execution
    run_distributed(train, 4, elastic_values(start, "sane_four", parallel=FOUR, debug=dict(sanity=True), **short))
    run_distributed(train, 2, elastic_values(start, "sane_pair", debug=dict(sanity=True), **short))
    run_distributed(train, 2, elastic_values(start, "plain_pair", **short))
    assert rows(start, "sane_pair") == rows(start, "plain_pair")
    for step, row in rows(start, "sane_four").items():
        assert row == pytest.approx(rows(start, "plain_pair")[step], rel=1e-5, abs=1e-7)
