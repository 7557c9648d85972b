"""The wrapped student's head, whose gradient bypasses autograd, gets the gradient that the bare student's gets."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic.config.sections import DistillConfig, OptimConfig
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.space.gates import Gates
from elastic.train.optimizer import build_optimizer, wrap_for_training
from elastic.train.pipeline import PipelineRunner
from elastic.world.groups import Layout, join_world
from tests.distributed.elastic_step import MICRO_BATCH, SEQUENCE, batch, mixed_gates, tiny_space
from tests.distributed.harness import run_distributed

HEADS = {False: "output_layer.weight", True: "embedding.word_embeddings.weight"}


def _head_gradients(layout: Layout, tied: bool, overlap: bool) -> tuple[Tensor, Tensor] | None:
    """Return the head's gradient of a step, wrapped and bare; None on a stage that has no head.

    Micro-batches are masked, a cut slice, one of full width. Their number is a power of two: Megatron-Core divides by
    that of the tokens with an fp32 factor.
    """
    here, space = join_world(layout, torch.device("cpu")), tiny_space()
    space = replace(space, parent=replace(space.parent, tied_embeddings=tied))
    work_gates = [mixed_gates(space, number, layout.dtype) for number in (0, 1, 3)]
    work_gates.append(Gates.slice(space.subnet({}), budget=0))
    found, teacher = [], build_model(space, layout, seed=2, init_std=0.3)
    teacher.requires_grad_(False)
    optim, distill = OptimConfig(overlap_grad_reduce=overlap), DistillConfig(cross_entropy_weight=0.3, chunk_tokens=7)
    for is_wrapped in (True, False):
        model = build_model(space, layout, seed=1, init_std=0.3)
        student = wrap_for_training(model, optim) if is_wrapped else model
        runner = PipelineRunner(here, student, distill, teacher)
        if is_wrapped:
            build_optimizer(student, optim, here)
            student.zero_grad_buffer()
        work = runner.with_teacher([runner.share(batch(g), gates) for g, gates in enumerate(work_gates)])
        runner.forward_backward(work)
        head = dict(named_global_parameters(model)).get(HEADS[tied])
        if head is None:
            assert not here.is_last_stage
            continue
        gradient = head.main_grad if is_wrapped else head.grad / (len(work) * MICRO_BATCH * SEQUENCE)
        if (
            not is_wrapped and tied and layout.pipeline > 1
        ):  # no one else adds up the bare copies of first and last stage
            dist.all_reduce(gradient)
        found.append(gradient.clone())
    return (found[0], found[1]) if found else None


@pytest.mark.parametrize("overlap", [False, True], ids=["at the end", "overlapping"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_wrapped_head_has_the_bare_heads_gradient(pipeline: int, tied: bool, overlap: bool) -> None:
    layout = Layout(pipeline=pipeline, dtype=torch.float64)
    ranks = run_distributed(_head_gradients, pipeline, layout, tied, overlap)
    assert ranks[-1] is not None
    for wrapped, bare in filter(None, ranks):
        assert bare.abs().max() > 1e-4
        torch.testing.assert_close(wrapped, bare, rtol=1e-11, atol=1e-13)
