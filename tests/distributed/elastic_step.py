"""One elastic step on any layout: what every rank contributes, in a form that two layouts can be compared by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elastic.config.sections import DistillConfig, OptimConfig
from elastic.data.stream import Batch
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.model.sharding import unshard_tensors
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, Space
from elastic.train.optimizer import build_optimizer, gradient_norm, sum_gate_gradients, wrap_for_training
from elastic.train.pipeline import PipelineRunner
from elastic.world.groups import Layout, join_world
from tests.shapes import random_choice

SEQUENCE, MICRO_BATCH, GLOBAL_BATCH = 32, 1, 4
# Lengths of the isolated documents of two micro-batches; shards of TP 2 and chunks of CP 2 end inside some of them.
PACKED = {2: (5, 14, 1, 12), 3: (8, 3, 21)}


FROZEN = DistillConfig(cross_entropy_weight=0.3, temperature=1.5, chunk_tokens=11)


@dataclass(frozen=True)
class LayoutCase:
    """A parallel layout and the number of processes it needs; `counted` says which micro-batches have which mask.

    `loss` without a teacher of its own (`trained`) takes the student's whole model.
    """

    name: str
    layout: Layout
    data: int = 1
    counted: Mapping[int, Tensor] = field(default_factory=dict)
    loss: DistillConfig = FROZEN

    @property
    def world_size(self) -> int:
        return self.layout.tensor * self.layout.pipeline * self.layout.context * self.data


def tiny_space() -> Space:
    """A parent that shards at TP 2 and CP 2, every axis elastic, per-layer FFN and attention heads."""
    shape = ModelShape.uniform(
        "M-*M-M*-", vocab=64, hidden=32, ffn=64, mamba_heads=8, head_channels=8, mamba_groups=4, mamba_state=8,
        conv_kernel=4, attention_heads=8, kv_heads=4, attention_channels=8,
    )  # fmt: skip
    choices = {
        Axis.HIDDEN: AxisChoices((32, 24, 16)),
        Axis.FFN: AxisChoices((64, 40, 16), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((8, 4)),
        Axis.MAMBA_CHANNEL: AxisChoices((8, 6)),
        Axis.ATTENTION_HEAD: AxisChoices((8, 4), per_layer=True),
        Axis.DEPTH: AxisChoices((8, 7, 6)),
    }
    return Space(shape, choices, lanes=8, depth_ranking=(0, 3, 2, 6, 1, 4, 7, 5))


def batch(global_index: int, counted: Tensor | None = None) -> Batch:
    """The micro-batch with this global number, the same at any layout; `counted` [B, S] is the mask of its labels."""
    generator = torch.Generator().manual_seed(100 + global_index)
    tokens = torch.randint(64, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
    ids, positions = torch.arange(MICRO_BATCH), None
    if lengths := PACKED.get(global_index):
        positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths]).expand(MICRO_BATCH, -1)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ids, counted, positions)


def mixed_gates(space: Space, global_index: int, dtype: torch.dtype) -> Gates:
    """Another choice for every micro-batch: soft, then one-hot (a real submodel), then slices by hard choice."""
    generator = torch.Generator().manual_seed(global_index)
    if global_index % 4 == 3:
        return Gates.slice(space.subnet(random_choice(space, generator)), budget=0)
    weights = {}
    for axis in space.elastic_axes():
        soft = torch.randn(space.num_slots(axis), len(space.axes[axis].choices), generator=generator).softmax(-1)
        hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1])
        weights[axis] = (soft if global_index % 2 == 0 else hard).to(dtype).requires_grad_()
    return Gates.mask(weights, budget=0)


def elastic_step(case: LayoutCase) -> dict[str, Any]:
    """Run teacher and student over the global batch; return this rank's losses and gradients."""
    here = join_world(case.layout, torch.device("cpu"))
    space = tiny_space()
    student, teacher = (
        build_model(space, case.layout, seed=1, init_std=0.3),
        build_model(space, case.layout, seed=2, init_std=0.3),
    )
    teacher.requires_grad_(False)
    wrapped = wrap_for_training(student, OptimConfig())
    optimizer = build_optimizer(wrapped, OptimConfig(clip_grad=1.0), here)
    runner = PipelineRunner(here, wrapped, case.loss, teacher if case.loss.teacher == "frozen" else None)
    local = range(GLOBAL_BATCH // (MICRO_BATCH * here.data_size))
    numbers = [index * here.data_size + here.data_rank for index in local]
    gates_dtype = torch.promote_types(case.layout.dtype, torch.float32)
    work = [runner.share(batch(g, case.counted.get(g)), mixed_gates(space, g, gates_dtype)) for g in numbers]
    work = runner.with_teacher(work)
    wrapped.zero_grad_buffer()
    losses = runner.forward_backward(work)
    gate_gradients = {
        g: {
            axis.value: _gate_gradient(micro.gates, axis, here) for axis in (micro.gates.weights if micro.gates else ())
        }
        for g, micro in zip(numbers, work, strict=True)
    }
    gradients = {name: parameter.main_grad.clone() for name, parameter in named_global_parameters(student)}
    return {
        "tp": here.groups.tp.rank(),
        "dp": here.data_rank,
        "cp": here.groups.cp.rank(),
        "last": here.is_last_stage,
        "losses": {g: (float(loss.kl), float(loss.cross_entropy)) for g, loss in zip(numbers, losses, strict=False)},
        "num_tokens": {g: int(loss.num_tokens) for g, loss in zip(numbers, losses, strict=False)},
        "gate_gradients": gate_gradients,
        "gradients": gradients,
        "grad_norm": float(gradient_norm(optimizer, here.device)),
    }


def _gate_gradient(gates: Gates, axis: Axis, here: Any) -> Tensor:
    gradient = gates.weights[axis].grad
    flat = torch.zeros_like(gates.weights[axis]) if gradient is None else gradient
    return sum_gate_gradients(flat.reshape(-1), [(axis, flat.numel())], here).view_as(flat)


def merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the ranks of one run: full gradients, losses summed over context-parallel ranks."""
    shape = tiny_space().parent
    gradients: dict[str, Tensor] = {}
    first = [rank for rank in ranks if rank["dp"] == 0 and rank["cp"] == 0]
    for name in dict.fromkeys(name for rank in first for name in rank["gradients"]):
        holders = sorted((rank for rank in first if name in rank["gradients"]), key=lambda rank: rank["tp"])
        gradients[name] = unshard_tensors([rank["gradients"][name] for rank in holders], name, shape)
    losses: dict[int, tuple[float, float]] = {}
    for rank in ranks:
        if rank["last"] and rank["tp"] == 0:
            for g, pair in rank["losses"].items():
                before = losses.get(g, (0.0, 0.0))
                losses[g] = (before[0] + pair[0], before[1] + pair[1])
    gates = {g: value for rank in ranks for g, value in rank["gate_gradients"].items()}
    return {"gradients": gradients, "losses": losses, "gate_gradients": gates, "grad_norm": ranks[0]["grad_norm"]}
