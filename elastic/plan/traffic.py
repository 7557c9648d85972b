"""Bytes of collectives of a step: the payload is the whole tensor that is gathered, scattered, reduced or exchanged.

Read off Megatron-Core's tensor-parallel layers and mappings, `elastic.model` and `elastic.train`. The letters are
those of `work`. Left out for their size: gate gradients, router gradients, the grad norm, the tokens of a batch.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from elastic.plan.memory import parameter_bytes, rank_parameters
from elastic.plan.work import FP32_BYTES, KernelSet, LayerWork, MicroBatchWork
from elastic.space.axes import Axis, LayerKind

Traffic = Mapping[tuple[str, str], int]  # (group, operation) -> payload bytes of one rank


def moved_bytes(operation: str, payload: float, ranks: int) -> float:
    """Return what one rank sends over its link: ring algorithms, an all-reduce is a scatter and a gather."""
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share, "send": 1.0}.get(operation, share) * payload


def pass_traffic(run: MicroBatchWork, stage: int) -> dict[str, Traffic]:
    """Return one rank's traffic for one micro-batch by pass: teacher's and student's, recompute, backward and loss."""
    first, last = stage == 0, stage == run.layout.pipeline - 1
    passes: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for layer, count in run.teacher.distinct_layers(stage):
        passes["teacher"].update(_layer(layer, count, gathers=1, scatters=1))
    for layer, count in run.distinct_layers(stage):
        passes["forward"].update(_layer(layer, count, gathers=1, scatters=1))
        # The mirror of forward, and the input gathered once more for the weight.
        passes["backward"].update(_layer(layer, count, gathers=2, scatters=1, backward=True))
        if (
            run.layout.recompute == "full"
        ):  # ends with the last saved tensor: where the residual gate keeps it, the output
            gated = run.gates(Axis.HIDDEN, Axis.DEPTH) and layer.kind is not LayerKind.ATTENTION
            passes["recompute"].update(_layer(layer, count, gathers=1, scatters=int(gated)))
    if not last:  # between stages a slice is padded to the full width
        passes["teacher"]["pp", "send"] += run.teacher.stream_bytes
        passes["forward"]["pp", "send"] += run.teacher.stream_bytes
    if not first:
        passes["backward"]["pp", "send"] += run.teacher.stream_bytes
    if run.layout.tensor > 1:
        _add_ends(passes, run, first, last)
    return dict(passes)


def micro_batch_traffic(run: MicroBatchWork, stage: int) -> Traffic:
    """Add up one rank's traffic for one micro-batch."""
    return sum((Counter(traffic) for traffic in pass_traffic(run, stage).values()), Counter())


def _layer(layer: LayerWork, count: int, gathers: int, scatters: int, backward: bool = False) -> Traffic:
    """Count one pass of `count` equal layers: the stream gathered and scattered so many times, all-reduced without
    sequence parallelism, and the context-parallel exchange."""
    run, stream = layer.run, count * layer.run.gathered_bytes
    found = Counter({key: count * payload for key, payload in _context(layer, backward).items()})
    if run.layout.tensor > 1 and run.layout.sequence:
        found["tp", "all_gather"] += gathers * stream
        found["tp", "reduce_scatter"] += scatters * stream
    elif run.layout.tensor > 1:
        found["tp", "all_reduce"] += scatters * stream
    return found


def _context(layer: LayerWork, backward: bool) -> Traffic:
    """Count the context-parallel exchange of one pass.

    Mamba trades tokens for heads and back (all-to-all of [z, x, B, C, dt], then of the scan's output). The PyTorch
    attention gathers keys and values; Transformer Engine passes them round the ring, in backward with their gradients.
    """
    run, ranks = layer.run, layer.run.layout.context
    if ranks == 1 or layer.kind is LayerKind.MLP:
        return {}
    if layer.kind is LayerKind.MAMBA:
        return {("cp", "all_to_all"): layer.scan.tokens * (layer.scan.rows + layer.scan.inner) * run.element_bytes}
    keys_values = 2 * run.tokens * layer.local_kv * run.element_bytes
    if run.kernels is KernelSet.FUSED:
        return {("cp", "send"): keys_values * (2 * ranks - 1 if backward else ranks - 1)}
    return {("cp", "reduce_scatter" if backward else "all_gather"): keys_values * ranks}


def _add_ends(passes: Mapping[str, Counter[tuple[str, str]]], run: MicroBatchWork, first: bool, last: bool) -> None:
    """Count embedding and loss: the vocabulary is split over the tensor-parallel ranks."""
    full, sequence = run.teacher.gathered_bytes, run.layout.sequence
    if first:  # both models embed; the student's gradient is gathered
        for name in ("teacher", "forward"):
            passes[name]["tp", "reduce_scatter" if sequence else "all_reduce"] += full
        if sequence:
            passes["backward"]["tp", "all_gather"] += full
    if last:
        # Two maxima, then label logit, teacher, product and student sums of every token, fp32.
        passes["loss"]["tp", "all_reduce"] += 6 * run.tokens * FP32_BYTES
        if sequence:
            passes["loss"]["tp", "all_gather"] += run.gathered_bytes + full
            passes["loss"]["tp", "reduce_scatter"] += run.gathered_bytes
        else:
            passes["loss"]["tp", "all_reduce"] += run.gathered_bytes


def step_traffic(run: MicroBatchWork, stage: int, distributed_optimizer: bool) -> Traffic:
    """Return one rank's traffic that comes once a step: gradients over replicas and context ranks, fp32.

    The distributed optimizer scatters them and gathers the new weights; without it they are all-reduced.
    """
    elements = rank_parameters(run.parent, run.layout.tensor, run.layout.pipeline, stage)
    gradients = FP32_BYTES * sum(elements.values())
    if not distributed_optimizer:
        return {("dp", "all_reduce"): gradients}
    return {("dp", "reduce_scatter"): gradients, ("dp", "all_gather"): parameter_bytes(elements, run.layout)}
