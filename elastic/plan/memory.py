"""Bytes of one rank: what stands still (weights, gradients, optimizer, teacher) and what a step adds at its peak.

The letters are those of `work`; v this rank's rows of the vocabulary, n tokens of one chunk of the loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

from elastic.model.sharding import sharded_dim
from elastic.plan.activations import fused_scan_workspace_bytes, saved_bytes
from elastic.plan.work import FP32_BYTES, KernelSet, LayerWork, MicroBatchWork, distinct, stage_layers
from elastic.space.axes import Axis, LayerKind
from elastic.space.layers import FP32_PARAMETERS, LAYER_PREFIX, LAYERS, MODEL_PARAMETERS
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape
from elastic.world.groups import Layout


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of one pipeline stage at its peak; `activations` of all micro-batches in flight."""

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    teacher_hidden: int
    activations: int
    working_set: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """Return the peak: the largest layer's working set and the loss never live at once."""
        steady = sum(getattr(self, field.name) for field in fields(self) if field.name not in ("working_set", "logits"))
        return steady + max(self.working_set, self.logits)


@cache
def rank_parameters(parent: ModelShape, tensor: int, pipeline: int, stage: int) -> Mapping[str, int]:
    """Return the number of elements of every parameter on one rank of a stage, exactly."""
    embedding, final_norm, head = MODEL_PARAMETERS
    names = [embedding] if stage == 0 else []
    for layer_index in stage_layers(parent, pipeline)[stage]:
        kind = parent.pattern.kinds[layer_index]
        names += [f"{LAYER_PREFIX}{layer_index}.{name}" for name in LAYERS[kind].parameters]
    if stage == pipeline - 1:
        names += [final_norm] if parent.tied_embeddings and stage == 0 else [final_norm, head]
    whole = {name: math.prod(parameter_size(name, parent)) for name in names}
    return {name: size if sharded_dim(name) is None else size // tensor for name, size in whole.items()}


def parameter_bytes(elements: Mapping[str, int], layout: Layout) -> int:
    """Return the bytes of parameters; A_log and D stay in fp32."""
    return sum(
        count * (FP32_BYTES if name.endswith(FP32_PARAMETERS) else layout.dtype.itemsize)
        for name, count in elements.items()
    )


def optimizer_bytes(elements: Mapping[str, int], layout: Layout, shards: int = 1) -> int:
    """Return the bytes of Adam: two fp32 moments, and an fp32 master of whatever is not fp32 itself.

    The distributed optimizer holds 1 / shards of them, a master of the fp32 parameters included in its buffer.
    """
    masters = sum(
        count
        for name, count in elements.items()
        if layout.dtype.itemsize < FP32_BYTES and not name.endswith(FP32_PARAMETERS)
    )
    return (2 * sum(elements.values()) + masters) * FP32_BYTES // shards


def stage_memory(
    run: MicroBatchWork, stage: int, micro_batches: int, num_chunks: int, optimizer_shards: int = 1
) -> StageMemory:
    """Add up one rank of a stage for a step of `micro_batches`, all like `run`; `optimizer_shards` ranks share Adam's
    state, 1 without the distributed optimizer.

    1F1B: stage s of p keeps min(p - s, micro-batches) of them. The teacher runs first and leaves the final hidden
    states of every micro-batch of the step on the last stage.
    """
    layout, teacher = run.layout, run.teacher
    elements = rank_parameters(run.parent, layout.tensor, layout.pipeline, stage)
    in_flight = min(layout.pipeline - stage, micro_batches)
    last = stage == layout.pipeline - 1
    parameters = parameter_bytes(elements, layout)
    return StageMemory(
        parameters=parameters,
        gradients=FP32_BYTES * sum(elements.values()),
        optimizer=optimizer_bytes(elements, layout, optimizer_shards),
        teacher=parameters,
        # On the last stage; on all but the first the teacher also holds on to the last stream it was sent.
        teacher_hidden=(micro_batches * last + (stage > 0)) * teacher.stream_bytes,
        activations=in_flight * stage_activation_bytes(run, stage),
        working_set=max((layer_working_set_bytes(layer) for layer, _ in distinct(run.layers(stage))), default=0),
        logits=loss_bytes(run, num_chunks) if last else 0,
        # Megatron-Core's for gathered streams (GlobalMemoryBuffer "mpu"); the teacher's is full.
        buffers=teacher.gathered_bytes if layout.sequence else 0,
    )


def stage_activation_bytes(run: MicroBatchWork, stage: int) -> int:
    """Return what one micro-batch keeps on one stage between its forward and its backward pass."""
    if run.layout.recompute:  # a slice's first layer keeps a view of the whole stream it was given
        kept = len(run.layers(stage)) * run.stream_bytes + run.teacher.stream_bytes - run.stream_bytes
    else:
        kept = sum(count * saved_bytes(layer) for layer, count in distinct(run.layers(stage)))
    if stage == 0 and run.gates(Axis.HIDDEN):
        # The hidden gate keeps the embedding it multiplies. Later stages' received stream lives in the first layer.
        kept += run.stream_bytes
    if stage == run.layout.pipeline - 1:  # the final norm, as every norm; its output is gathered for the loss and gone
        kept += run.stream_tokens * run.hidden * (FP32_BYTES + run.element_bytes)
    return kept


def layer_working_set_bytes(layer: LayerWork) -> int:
    """Return what one layer's backward pass needs beside what all layers keep.

    A recomputed layer first makes its saved tensors again. Then gradients: the stream's, gathered and not, and of the
    widest inner tensors (three of them at once: two from the ends of an elementwise step and one in fp32).
    """
    run, e = layer.run, layer.run.element_bytes
    again = saved_bytes(layer) if run.layout.recompute else 0
    gradients = 2 * run.gathered_bytes + 2 * run.stream_bytes
    match layer.kind:
        case LayerKind.MLP:
            gradients += 3 * run.tokens * layer.inner * e
        case LayerKind.ATTENTION:
            gradients += 2 * run.tokens * layer.rows * e
        case LayerKind.MAMBA:
            scan = layer.scan
            in_norm = 3 * run.tokens * layer.inner * FP32_BYTES
            workspace = fused_scan_workspace_bytes(scan, e) if run.kernels is KernelSet.FUSED else 0
            in_scan = workspace + scan.tokens * (scan.rows + scan.inner) * e
            gradients += max(in_norm, in_scan)
    # And of the layer's first weight, before it is added to the fp32 buffer.
    return again + gradients + layer.rows * run.hidden * e


def loss_bytes(run: MicroBatchWork, num_chunks: int) -> int:
    """Return what the chunked loss holds at once (`elastic.distill.kl`).

    Student's and teacher's hidden states gathered over the tensor-parallel group, the gradient of the student's; the
    head's gradient in fp32 and one product to be added to it; three [n, v] buffers in fp32.
    """
    gathers = run.layout.tensor > 1 and run.layout.sequence
    hidden = run.gathered_bytes + (run.gathered_bytes + run.teacher.gathered_bytes if gathers else 0)
    head = run.local_vocab * run.hidden * (2 * FP32_BYTES)
    chunk = math.ceil(run.tokens / num_chunks)
    return hidden + head + 3 * chunk * run.local_vocab * FP32_BYTES
