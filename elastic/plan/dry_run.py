"""The dry run: one rank of a large job, the project's own code on tensors without memory, beside what the plan says.

torch's fake process group answers every collective at once, FakeTensorMode gives tensors shapes and no storage. The
run builds student and teacher, the data-parallel wrapper and the pipeline schedule as `verbs/training.py` does, and
traces teacher, forward, recompute, backward and gradient reduction of one step. The optimizer is left out: its
grad norm decides on values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from elastic.config.sections import DistillConfig, OptimConfig
from elastic.model.backends import Kernels
from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.model import build_model
from elastic.plan.config import PlanConfig
from elastic.plan.flops import stage_flops
from elastic.plan.live import CollectiveBytes, LiveBytes, MovedBytes, ProductFlops
from elastic.plan.memory import stage_activation_bytes, stage_memory
from elastic.plan.moved import Moved, stage_moved
from elastic.plan.phases import PhasePlan
from elastic.plan.search import Candidate
from elastic.plan.stand_ins import stand_ins
from elastic.plan.traffic import micro_batch_traffic, step_traffic
from elastic.plan.work import KernelSet, MicroBatchWork
from elastic.space.gates import Gates
from elastic.space.space import Space
from elastic.train.optimizer import build_optimizer, wrap_for_training
from elastic.train.pipeline import MicroBatch, PipelineRunner
from elastic.world.groups import Layout, World


def trace_step(
    run: MicroBatchWork,
    space: Space,
    here: World,
    micro_batches: int,
    distill: DistillConfig,
    optim: OptimConfig,
    with_optimizer: bool = False,
    still_s: float = 0.0,
) -> dict[str, int]:
    """Build what a training run builds and watch one step of it, on fake tensors or real ones; return what it took.

    Bytes, of collectives by group and operation, FLOPs of matrix products without the stand-ins', and with stand-ins
    what all but products and loss reads and writes in how many kernels. The activations are what stays on this stage
    after a forward pass, the peak all that is alive at once during forward and backward.
    `still_s` is how long a process group's threads may hold a tensor that was sent. `with_optimizer` builds and steps
    it too, which asks for values: real tensors only; else it counts 0.
    """
    moved = MovedBytes()
    kernels = stand_ins(moved) if run.kernels is KernelSet.FUSED else Kernels.choose(torch.device("cpu"))
    groups = {"tp": here.groups.tp, "pp": here.groups.pp, "cp": here.groups.cp, "dp": here.groups.dp_cp}
    with LiveBytes() as live:
        # 1. Build: student, teacher, gradient buffers, optimizer.
        student, teacher = (build_model(space, run.layout, kernels=kernels) for _ in range(2))
        teacher.requires_grad_(False)
        parameters = live.bytes // 2
        wrapped = wrap_for_training(student, optim)
        gradients = live.bytes - 2 * parameters
        optimizer = build_optimizer(wrapped, optim, here) if with_optimizer else None
        masters = live.bytes - gradients - 2 * parameters
        wrapped.config.finalize_model_grads_func = _reduce_gradients
        runner = _Rehearsed(moved, here, wrapped, distill, teacher)
        if run.layout.sequence:  # it would count as what the first forward pass keeps
            size = [run.tokens // run.batch, run.batch, run.parent.hidden]
            get_global_memory_buffer().get_tensor(size, run.layout.dtype, "mpu")
        # 2. One micro-batch's forward pass alone.
        activations = _held_after_forward(live, wrapped, run, space, still_s)
        # 3. The step.
        work = [_micro_batch(run, space) for _ in range(micro_batches)]
        before, moved.part = live.bytes, "layers"
        with ProductFlops() as products, CollectiveBytes(groups) as collectives, moved:
            work = runner.with_teacher(work)
            teacher_hidden = live.bytes - before
            live.reset_peak()
            runner.forward_backward(work)
        peak, before = live.peak_bytes, live.bytes
        if optimizer is not None:
            optimizer.step()
        moments = live.bytes - before  # Adam makes them with its first step; from then on they are always there
    seen = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": masters + moments,
        "teacher's states": teacher_hidden,
        "activations of one micro-batch": activations,
        "peak": peak + moments,
        "FLOPs": products.flops,
    }
    if run.kernels is KernelSet.FUSED:
        seen |= {"elementwise bytes": moved.moved["layers"], "kernels": moved.launches["layers"]}
    return seen | {" ".join(key): payload for key, payload in collectives.payload.items()}


class _Rehearsed(PipelineRunner):
    """Counts what the loss moves apart: on tensors without a GPU it is computed in PyTorch."""

    def __init__(self, moved: MovedBytes, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.moved = moved

    def _student_loss(self, batch: MicroBatch, hidden: Tensor) -> Any:
        self.moved.part = "loss"
        found = super()._student_loss(batch, hidden)
        self.moved.part = "layers"
        return found


@contextmanager
def fake_world(layout: Layout, num_gpus: int, stage: int) -> Iterator[World]:
    """Be the first rank of a pipeline stage of a job that is not there, on tensors without storage.

    No other process group may be up.
    """
    assert not dist.is_initialized(), "a dry run brings its own process group"
    rank = stage * num_gpus // layout.pipeline  # Megatron-Core's order: stages last
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_gpus)
    try:
        use_cpu_backend()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            create_gloo_process_groups=False,
        )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        with FakeTensorMode():
            yield World(layout, ProcessGroupCollection.use_mpu_process_groups(), device)
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
        dist.destroy_process_group()


def _reduce_gradients(models: list[Any], *_args: Any, **_kwargs: Any) -> None:
    """Reduce every bucket of the gradient buffers over replicas and context ranks, one collective each.

    Stands for finalize_model_grads, which coalesces these (fake tensors cannot) and then asks for the number of tokens.
    """
    for bucket_group in (group for model in models for group in model.bucket_groups):
        sharded = bucket_group.ddp_config.use_distributed_optimizer
        group = bucket_group.intra_distributed_optimizer_instance_group if sharded else bucket_group.data_parallel_group
        for bucket in bucket_group.buckets:
            if sharded:
                shard = bucket.grad_data.chunk(group.size())[group.rank()]
                dist.reduce_scatter_tensor(shard, bucket.grad_data, group=group)
            else:
                dist.all_reduce(bucket.grad_data, group=group)


def _micro_batch(run: MicroBatchWork, space: Space) -> MicroBatch:
    """Make this context-parallel rank's tokens and labels, and gates of the run's execution."""
    shape = (run.batch, run.length_tokens // run.layout.context)
    tokens, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    sizes = {axis: (space.num_slots(axis), len(space.axes[axis].choices)) for axis in space.elastic_axes()}
    weights = {axis: torch.zeros(size).requires_grad_() for axis, size in sizes.items()}
    return MicroBatch(tokens, labels, None, Gates.mask(weights) if run.masked else Gates.slice(run.subnet))


def _held_after_forward(live: LiveBytes, student: Any, run: MicroBatchWork, space: Space, still_s: float) -> int:
    """Return the bytes one micro-batch keeps alive once its forward pass of this stage is over, output left out."""
    bare, batch = student.module, _micro_batch(run, space)
    stream: Tensor | None = None
    before = live.settled(still_s)
    if not bare.pre_process:
        size = (run.stream_tokens // run.batch, run.batch, run.parent.hidden)
        stream = torch.zeros(size, dtype=run.layout.dtype).requires_grad_()
        bare.set_input_tensor(stream)
    output = student(batch.tokens, batch.gates)
    held = live.settled(still_s) - before - output.nbytes
    bare.set_input_tensor(None)
    del output
    return held


def rehearse(config: PlanConfig, space: Space, chosen: Candidate) -> list[dict[str, Any]]:
    """Trace first, a middle and last stage of every phase; return one row per phase, stage and quantity.

    A step has just the micro-batches that are alive at once on the stage under 1F1B: more only take longer.
    """
    rows = []
    for plan in chosen.plans:
        run, last = max(plan.shares, key=lambda share: share.weight).run, plan.layout.pipeline - 1
        for stage in sorted({0, plan.layout.pipeline // 2, last}):
            in_flight = plan.layout.pipeline - stage
            with fake_world(plan.layout, config.cluster.num_gpus, stage) as here:
                traced = trace_step(run, space, here, in_flight, config.distill, config.optim)
            rows += comparison(plan, run, stage, traced, in_flight)
    return rows


def comparison(
    plan: PhasePlan, run: MicroBatchWork, stage: int, traced: dict[str, int], count: int
) -> list[dict[str, Any]]:
    """Return plan and trace of one rank side by side, for a step of `count` micro-batches.

    A dry run has no optimizer, the stand-ins no FLOPs; the gather of new weights belongs to the optimizer.
    """
    memory, flops = stage_memory(run, stage, count, plan.config.distill.chunk_tokens), stage_flops(run, stage)
    if traced["optimizer"] == 0:
        memory = replace(memory, optimizer=0)
    planned: dict[str, float] = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "teacher's states": memory.teacher_hidden,
        "activations of one micro-batch": stage_activation_bytes(run, stage),
        "peak": memory.total,
        "FLOPs": count * (flops.matmul if run.kernels is KernelSet.FUSED else flops.total),
    }
    if run.kernels is KernelSet.FUSED:  # what plain PyTorch moves on a CPU is of no interest
        moved = sum(stage_moved(run, stage, sums_in_products=False).values(), Moved()) * count
        planned |= {"elementwise bytes": moved.bytes, "kernels": moved.launches}
    sent = {key: count * payload for key, payload in micro_batch_traffic(run, stage).items()}
    sent |= step_traffic(run, stage, plan.config.optim.use_distributed_optimizer)
    planned |= {" ".join(key): sent[key] for key in sorted(sent) if key != ("dp", "all_gather")}
    both = {what: (planned.get(what, 0), traced.get(what, 0)) for what in planned | traced}
    return [
        {"phase": plan.phase.name, "stage": stage, "what": what, "plan": plan_says, "trace": trace_says}
        for what, (plan_says, trace_says) in both.items()
        if plan_says or trace_says
    ]
