"""Rules of thumb a layout breaks: nothing is refused for them, each costs speed or safety. The limits are ours."""

import math
from collections.abc import Iterator
from dataclasses import replace

from elastic.plan.activations import FUSED_CHUNK_TOKENS
from elastic.plan.config import PlanConfig
from elastic.plan.phases import PhasePlan
from elastic.plan.search import Candidate
from elastic.plan.timing import StepTime
from elastic.plan.work import FP32_BYTES, distinct
from elastic.space.axes import LayerKind

MAX_BUBBLE, MAX_IMBALANCE, MAX_EXPOSED = 0.10, 0.15, 0.25
MIN_LOCAL_COLUMNS, MIN_LOCAL_TOKENS, MAX_CHUNK_BYTES = 512, 1024, 1 << 30


def warnings(config: PlanConfig, chosen: Candidate) -> list[str]:
    """List the rules of thumb that a layout breaks, each with what would help."""
    lines = list(_layout_warnings(config, chosen))
    for plan, time in zip(chosen.plans, chosen.times, strict=True):
        lines += [f"{plan.phase.name}: {text}" for text in _phase_warnings(config, plan, time)]
    return lines


def _layout_warnings(config: PlanConfig, chosen: Candidate) -> Iterator[str]:
    parallel, cluster = chosen.parallel, config.cluster
    if parallel.tensor > cluster.gpus_per_node:
        yield f"tensor parallelism over {parallel.tensor} ranks leaves the node of {cluster.gpus_per_node} GPUs"
    elif parallel.tensor * parallel.context > cluster.gpus_per_node and parallel.context > 1:
        yield (
            f"tensor x context = {parallel.tensor * parallel.context} ranks leave the node of "
            f"{cluster.gpus_per_node} GPUs, so Mamba's exchange crosses the network"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        yield "parallel.sequence=false keeps the whole stream on every tensor-parallel rank; set it true"
    if chosen.peak_bytes > cluster.budget_bytes:
        yield (
            f"peak {chosen.peak_bytes / 1e9:.1f} GB leaves less than {cluster.spare:.0%} of {cluster.memory_gb:g} GB "
            f"beside {cluster.reserved_gb:g} GB of context, NCCL and allocator"
        )


def _phase_warnings(config: PlanConfig, plan: PhasePlan, time: StepTime) -> Iterator[str]:
    run, layout, stages = plan.shares[0].run, plan.layout, plan.layout.pipeline
    if time.bubble > MAX_BUBBLE * time.total:
        yield (
            f"{plan.micro_batches} micro-batches through {stages} stages leave {time.bubble / time.total:.0%} of the "
            "step waiting; fewer stages or replicas help"
        )
    work = [plan.flops(stage).total for stage in range(stages)]
    if max(work) > (1 + MAX_IMBALANCE) * sum(work) / stages:
        yield f"the slowest of {stages} stages has {max(work) * stages / sum(work) - 1:.0%} more work than the mean"
    for name, seconds in (("context", time.context), ("data", time.data), ("tensor", time.tensor)):
        if seconds > MAX_EXPOSED * time.total:
            yield f"{name}-parallel traffic takes {seconds / time.total:.0%} of the step where nothing hides it"
    if run.tokens // layout.tensor < MIN_LOCAL_TOKENS:
        yield f"{run.tokens // layout.tensor} tokens of the stream on one rank are few; a larger micro-batch helps"
    all_saved = plan.changed(layout=replace(layout, recompute=False))
    if layout.recompute and all_saved.peak_bytes <= config.cluster.budget_bytes:
        yield "fits without recompute: parallel.recompute=none saves a forward pass"
    chunk = math.ceil(run.tokens / plan.num_chunks) * run.local_vocab * FP32_BYTES
    if chunk > MAX_CHUNK_BYTES:
        yield f"a chunk of logits takes {chunk / 1e9:.2f} GB three times over; raise distill.num_chunks"
    yield from _width_warnings(plan)


def _width_warnings(plan: PhasePlan) -> Iterator[str]:
    """Yield widths that kernels serve badly on one rank."""
    for share in plan.shares:
        for layer, _ in distinct(tuple(one for s in range(plan.layout.pipeline) for one in share.run.layers(s))):
            if layer.inner < MIN_LOCAL_COLUMNS:
                yield f"{share.budget}: {layer.inner} columns of a {layer.kind.name} layer on one rank are few"
            if layer.kind is LayerKind.MAMBA and layer.scan.rows % 8:
                yield f"{share.budget}: {layer.scan.rows} in_proj rows on one rank: the convolution's input is copied"
    length = plan.phase.sequence_length
    if length % FUSED_CHUNK_TOKENS:
        yield f"sequence length {length} is not a multiple of the scan's chunk of {FUSED_CHUNK_TOKENS} tokens"
