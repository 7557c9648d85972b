"""Bytes of one rank: what stands still (weights, gradients, optimizer, teacher), and what a step adds at its peak.

What a layer keeps for its backward pass is read off `elastic.model` and the two kernel sets;
tests/distributed/test_plan.py holds it against live tensors. The letters are those of `work`; v this rank's rows of the
vocabulary, n tokens of one chunk of the loss, e the bytes of an element. In PyTorch a half-precision norm works on an
fp32 copy, which it keeps; our kernels keep their inputs alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

from elastic.model.model import Layout
from elastic.model.sharding import sharded_dim
from elastic.plan.work import FP32_BYTES, KernelSet, LayerWork, MicroBatchWork, ScanSizes, copied_elements, stage_layers
from elastic.space.axes import Axis, LayerKind
from elastic.space.layers import FP32_PARAMETERS, LAYER_PREFIX, LAYERS, MODEL_PARAMETERS
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape


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
    run: MicroBatchWork, stage: int, micro_batches: int, chunk_tokens: int, optimizer_shards: int = 1
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
        working_set=max((layer_working_set_bytes(layer) for layer, _ in run.distinct_layers(stage)), default=0),
        logits=loss_bytes(run, chunk_tokens) if last else 0,
        # Megatron-Core's for gathered streams (GlobalMemoryBuffer "mpu"); the teacher's is full.
        buffers=teacher.gathered_bytes if layout.sequence else 0,
    )


def stage_activation_bytes(run: MicroBatchWork, stage: int) -> int:
    """Return what one micro-batch keeps on one stage between its forward and its backward pass."""
    if run.layout.recompute == "full":  # a slice's first layer keeps a view of the whole stream it was given
        kept = len(run.layers(stage)) * run.stream_bytes + run.teacher.stream_bytes - run.stream_bytes
    else:
        kept = sum(count * saved_bytes(layer) for layer, count in run.distinct_layers(stage))
    if stage == 0 and run.gates(Axis.HIDDEN):
        # The hidden gate keeps the embedding it multiplies. Later stages' received stream lives in the first layer.
        kept += run.stream_bytes
    if stage == run.layout.pipeline - 1:  # the final norm, as every norm; its output is gathered for the loss and gone
        in_torch = FP32_BYTES + run.element_bytes
        kept += run.stream_tokens * run.hidden * (run.element_bytes if run.kernels is KernelSet.FUSED else in_torch)
    return kept


def layer_working_set_bytes(layer: LayerWork) -> int:
    """Return what one layer's backward pass needs beside what all layers keep.

    A recomputed layer first makes its saved tensors again, a selective one those between two products. Then gradients:
    the stream's, gathered and not, and of the widest inner tensors (three of them at once: two from the ends of an
    elementwise step and one in fp32).
    """
    run, e = layer.run, layer.run.element_bytes
    again = {"none": 0, "selective": max(_made_again(layer)), "full": saved_bytes(layer)}[run.layout.recompute]
    gradients = 2 * run.gathered_bytes + 2 * run.stream_bytes
    match layer.kind:
        case LayerKind.MLP:
            gradients += 3 * run.tokens * layer.inner * e
        case LayerKind.ATTENTION:
            gradients += 2 * run.tokens * layer.rows * e
            if run.gates(Axis.HIDDEN, Axis.DEPTH, Axis.ATTENTION_HEAD):  # of linear_proj's weight, and its gates
                gradients += 3 * layer.inner * run.hidden * FP32_BYTES
        case LayerKind.MAMBA:
            scan = layer.scan
            in_norm = 3 * run.tokens * layer.inner * FP32_BYTES
            workspace = fused_scan_workspace_bytes(scan, e) if run.kernels is KernelSet.FUSED else 0
            in_scan = workspace + scan.tokens * (scan.rows + scan.inner) * e
            gradients += max(in_norm, in_scan)
    # And of the layer's first weight, before it is added to the fp32 buffer.
    return again + gradients + layer.rows * run.hidden * e


def loss_bytes(run: MicroBatchWork, chunk_tokens: int) -> int:
    """Return what the chunked loss holds at once (`elastic.distill.kl`).

    Student's and teacher's hidden states gathered over the tensor-parallel group, the gradient of the student's; three
    [n, v] buffers in fp32. The head's gradient is summed where gradients are kept (PyTorch makes a product first).
    """
    gathers = run.layout.tensor > 1 and run.layout.sequence
    hidden = run.gathered_bytes + (run.gathered_bytes + run.teacher.gathered_bytes if gathers else 0)
    e, vocab = run.element_bytes, run.local_vocab
    chunk = 3 * min(chunk_tokens, run.tokens) * vocab * FP32_BYTES
    product = 0 if run.kernels is KernelSet.FUSED or e == FP32_BYTES else vocab * run.hidden * (e + FP32_BYTES)
    return hidden + chunk + product


def saved_bytes(layer: LayerWork) -> int:
    """Return the bytes a layer keeps for backward; under full recompute, once it was run again."""
    run, e = layer.run, layer.run.element_bytes
    fused = run.kernels is KernelSet.FUSED
    terms = {"norm": _norm(run.stream_tokens * run.hidden, run.stream_tokens, e)}
    if fused:  # its input, which is the stream, and the projection's
        terms["norm"] = 2 * run.stream_bytes
    match layer.kind:
        case LayerKind.MAMBA:
            terms |= _mamba(layer)
        case LayerKind.ATTENTION:
            terms |= _attention(layer)
        case LayerKind.MLP:
            # relu's result, which the square keeps, or a kernel's input; and the gated square, which fc2 keeps
            terms["neurons"] = 2 * run.tokens * layer.inner * e
            if run.gates(Axis.FFN) and not fused:  # the gate keeps what it multiplies
                terms["gate"] = run.tokens * layer.inner * e
    # The residual gate keeps the layer's output; those of attention multiply linear_proj's weight.
    if layer.kind is not LayerKind.ATTENTION and run.gates(Axis.HIDDEN, Axis.DEPTH):
        terms["output"] = run.stream_bytes
    if not run.masked:
        terms["weight copies"] = copied_elements(layer.cut, layer.kind) * e
    if run.layout.recompute == "selective":
        terms["made again"] = -sum(_made_again(layer))
    return sum(terms.values())


def _made_again(layer: LayerWork) -> list[int]:
    """Return the bytes of the steps between products, which selective recompute does not keep; their inputs stay."""
    run, scan, e = layer.run, layer.scan, layer.run.element_bytes
    fused, inner = run.kernels is KernelSet.FUSED, run.tokens * layer.inner * e
    norm = _norm(run.stream_tokens * run.hidden, run.stream_tokens, e)
    steps = [run.stream_bytes if fused else norm - run.stream_bytes]
    if layer.kind is LayerKind.MLP:
        steps.append(inner * (2 if run.gates(Axis.FFN) and not fused else 1))
    elif layer.kind is LayerKind.MAMBA:
        terms, conv_out = _mamba(layer), scan.tokens * scan.conv * e
        in_torch = terms.get("z gate", 0) + terms.get("gate", 0) - inner  # the scan's output is an input
        steps += [conv_out + terms.get("convolution", 0), terms["group norm"] + (0 if fused else in_torch)]
    return steps


def _norm(channels: int, rows: int, e: int) -> int:
    """Bytes of a gated norm: x in fp32, the normalised x, the weighted x that the projection keeps, and statistics."""
    return channels * (FP32_BYTES + 2 * e) + rows * 2 * FP32_BYTES


def _mamba(layer: LayerWork) -> dict[str, int]:
    """Bytes of a Mamba mixer: convolution, scan, gate and group norm.

    In PyTorch: the padded input and the sum of the taps before SiLU; the sum that softplus takes; silu(z), what it
    multiplies, and that again under a gate; a norm. Our kernels keep views of in_proj's rows and the norm's result.
    Under context parallelism those rows and the scan's output lie there twice, before the exchange and after.
    """
    run, scan, e = layer.run, layer.scan, layer.run.element_bytes
    inner, rows = run.tokens * layer.inner * e, scan.tokens * scan.rows * e
    if run.kernels is KernelSet.FUSED:
        again = rows + inner if run.layout.context > 1 else 0
        return {"z x B C dt": rows, "scan": _fused_scan(scan, e), "group norm": inner, "exchange": again}
    padding = scan.batch * (run.parent.conv_kernel - 1)
    return {
        "z x B C dt": rows,
        "convolution": (2 * scan.tokens + padding) * scan.conv * e,
        "dt": scan.tokens * scan.heads * FP32_BYTES,
        "scan": _torch_scan(scan, e),
        "z gate": 2 * inner,
        "gate": inner if run.gates(Axis.MAMBA_CHANNEL, Axis.MAMBA_HEAD) else 0,
        "group norm": _norm(run.tokens * layer.inner, run.tokens * layer.local_groups, e),
    }


def _torch_scan(scan: ScanSizes, e: int) -> int:
    """Bytes of TorchStateSpace.scan, its input from the convolution included.

    Per token and head: the decay between all pairs of a chunk in fp32 (and e), the scores; B and C repeated for every
    head by the batched products.
    """
    q, wide = KernelSet.TORCH.chunk_tokens, FP32_BYTES
    tokens = scan.padded_tokens(q)
    half = e if e < wide else 0  # a copy that exists only in half precision
    padded = tokens * scan.inner * e if tokens != scan.tokens else 0
    pairs = tokens * q * (scan.heads * (wide + half + e) + scan.groups * e)
    per_head = tokens * scan.heads * (3 * wide + 3 * half)
    repeated = 2 * tokens * scan.heads * scan.state * e + 2 * tokens * scan.groups * scan.state * e
    products = 4 * tokens * scan.inner * e  # dt x, its copy for the product, decayed to the chunk's end, from before
    states = tokens // q * scan.inner * scan.state * (wide + e)
    return scan.tokens * scan.conv * e + padded + pairs + per_head + repeated + products + states


def _fused_scan(scan: ScanSizes, e: int) -> int:
    """Bytes of mamba_chunk_scan_combined (mamba-ssm 2.2, ssd_combined.py), its input from the convolution included.

    Its autograd function keeps out, x, dt (a view of in_proj's rows), dA_cumsum, A, B, C and D; chunk states are
    computed again in backward.
    """
    tokens = scan.padded_tokens(KernelSet.FUSED.chunk_tokens)
    return scan.tokens * (scan.conv + scan.inner) * e + tokens * scan.heads * FP32_BYTES


def fused_scan_workspace_bytes(scan: ScanSizes, e: int) -> int:
    """Return what mamba_chunk_scan_combined's backward pass allocates at once (ssd_combined.py, same source).

    Chunk states and their gradients in fp32 and in e, C B^T of every chunk in fp32, gradients of x, B, C (fp32 sums)
    and dt.
    """
    q = KernelSet.FUSED.chunk_tokens
    tokens = scan.padded_tokens(q)
    states = 2 * tokens // q * scan.inner * scan.state * (FP32_BYTES + e)
    products = tokens * scan.groups * q * FP32_BYTES
    gradients = tokens * (scan.inner * e + 2 * scan.groups * scan.state * FP32_BYTES + scan.heads * FP32_BYTES)
    return states + products + gradients


def _attention(layer: LayerWork) -> dict[str, int]:
    """Bytes of attention. Both cores keep q, k, v, their output and one fp32 log-sum per query and head.

    Torch's flash kernel keeps k and v as views of linear_qkv's output, or gathered over the context ranks with the
    mask; Transformer Engine keeps contiguous copies of this rank's (FlashAttention 2, arXiv 2307.08691).
    """
    run, e = layer.run, layer.run.element_bytes
    query, keys_values = run.tokens * layer.inner * e, 2 * run.tokens * layer.local_kv * e
    # One query per key: q is a view of linear_qkv's output like k and v.
    is_view = run.kernels is KernelSet.TORCH and layer.width == run.parent.kv_heads
    terms = {"q": 0 if is_view else query, "out": query, "log-sum": run.tokens * layer.local_width * FP32_BYTES}
    if run.kernels is KernelSet.FUSED:
        terms["k v"] = keys_values
    elif run.layout.context == 1:
        terms["k v"] = query + keys_values
    else:
        half = run.tokens // run.batch // 2  # two chunks, each with a mask over all in front of it
        terms["k v"] = keys_values * run.layout.context
        terms["mask"] = half * half * (2 * run.layout.context + 1) * (1 + e)
    return terms
