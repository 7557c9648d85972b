"""Gradients that are summed while ranks compute are those summed afterwards.

That no weight is read before it is gathered is held by test_resume.py's overlapped runs.
"""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from elastic.config.sections import OptimConfig
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.train import optimizer as train_optimizer
from elastic.train.optimizer import build_optimizer, wrap_for_training
from elastic.train.pipeline import PipelineRunner
from elastic.verbs.training import FROM_SCRATCH
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import batch, mixed_gates, tiny_space
from tests.distributed.harness import run_distributed

BUCKET_VALUES = 3000  # several buckets even in the tiny model; Megatron-Core has 40 million
# Of each step the choices in order, the last micro-batch's of each replica; None: the whole parent, an int: masks.
SMALL = {Axis.HIDDEN: [1], Axis.MAMBA_HEAD: [1], Axis.DEPTH: [2]}
MEDIUM = {Axis.FFN: [0, 1, 2], Axis.DEPTH: [1]}
STEPS = [
    ("fullest last", SMALL, ({}, {})),
    ("layers skipped in the last", {}, (MEDIUM, MEDIUM)),
    ("all cut", MEDIUM, (SMALL, SMALL)),
    ("masks", None, (0, 1)),
    ("not alike", SMALL, (MEDIUM, {})),
    ("fullest last again", SMALL, ({}, {})),
]


def chosen(space, choice, dtype):
    if choice is None:
        return None
    if isinstance(choice, int):
        return mixed_gates(space, choice, dtype)
    return Gates.slice(space.subnet(choice), budget=0)


def gradients_of_steps(layout: Layout, tied: bool, overlap: bool):
    """Return this rank's gradients after every step, and the order in which buckets set off before the last wait."""
    here, space = join_world(layout, torch.device("cpu")), tiny_space()
    space = replace(space, parent=replace(space.parent, tied_embeddings=tied))
    model, optim = build_model(space, layout, seed=1, init_std=0.3), OptimConfig(overlap_grad_reduce=overlap)
    small_buckets = partial(DistributedDataParallelConfig, bucket_size=BUCKET_VALUES)
    with mock.patch.object(train_optimizer, "DistributedDataParallelConfig", small_buckets):
        wrapped = wrap_for_training(model, optim)
    build_optimizer(wrapped, optim, here)
    runner, finalize, found = PipelineRunner(here, wrapped, FROM_SCRATCH), wrapped.config.finalize_model_grads_func, []

    def note(number, start, *args, **kwargs):
        order.append(number)
        start(*args, **kwargs)

    for number, group in enumerate(wrapped.bucket_groups):
        group.start_grad_sync = partial(note, number, group.start_grad_sync)

    def finalized(*args, **kwargs):
        before_wait.extend(order)
        finalize(*args, **kwargs)

    wrapped.config.finalize_model_grads_func = finalized
    for _, first, last in STEPS:
        order, before_wait = [], []
        wrapped.zero_grad_buffer()
        choices = [chosen(space, choice, layout.dtype) for choice in (first, last[here.data_rank])]
        work = [runner.share(batch(2 * n + here.data_rank), gates) for n, gates in enumerate(choices)]
        runner.forward_backward(work, ends_alike=last[0] == last[1] or isinstance(last[0], int))
        gradients = {name: parameter.main_grad.clone() for name, parameter in named_global_parameters(model)}
        found.append((gradients, before_wait))
    return here.groups.pp.rank(), len(wrapped.bucket_groups), found


@pytest.mark.parametrize(("pipeline", "tied"), [(1, False), (1, True), (2, True)])
def test_overlapped_reduction_gives_the_same_gradients_whatever_a_step_skips(pipeline, tied):
    """Buckets set off before the last backward pass is over, in one order on all replicas."""
    layout = Layout(pipeline=pipeline, recompute="full" if pipeline > 1 else "none", dtype=torch.float64)
    plain, overlapped = (
        run_distributed(gradients_of_steps, 2 * pipeline, layout, tied, overlap) for overlap in (False, True)
    )
    orders = {}
    for (_, _, expected_steps), (stage, num_buckets, steps) in zip(plain, overlapped, strict=True):
        for number, ((expected, none), (found, order)) in enumerate(zip(expected_steps, steps, strict=True)):
            name = STEPS[number][0]
            for parameter, gradient in expected.items():
                assert torch.equal(found[parameter], gradient), f"{name}: {parameter}"
            # Megatron-Core learns in the first step what a bucket waits for.
            assert not none and sorted(order) == (list(range(num_buckets)) if number else []), name
            assert orders.setdefault((stage, number), order) == order, f"{name}: replicas differ"
            if name == "not alike":
                assert order == sorted(order), "held back: all together after the last backward pass"
        assert num_buckets > (5 if stage == 0 else 0)
