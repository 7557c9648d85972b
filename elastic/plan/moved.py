"""What one rank reads and writes in its memory beside matrix products, and how many kernels it launches.

Read off `elastic.model` and elastic/kernels, in which every operation reads its inputs and writes its results once;
the dry run counts them one by one. The letters are those of `work`. Left out for their size: gates, per-head numbers.
"""

from dataclasses import dataclass

from elastic.plan.memory import rank_parameters
from elastic.plan.work import (
    FP32_BYTES,
    FUSED_LAUNCHES,
    PROJECTIONS,
    LayerWork,
    MicroBatchWork,
    Summed,
    copied_elements,
)
from elastic.space.axes import Axis, LayerKind

# Kernels of a layer's forward and backward pass: of any, more under masks, and more of a cut one; without what
# FUSED_LAUNCHES counts and what context parallelism adds. tests/distributed/test_plan.py holds them to the dry run.
_LAUNCHES = {LayerKind.MAMBA: (9, 20), LayerKind.ATTENTION: (7, 9), LayerKind.MLP: (5, 9)}
_MASK_LAUNCHES = {LayerKind.MAMBA: (4, 14), LayerKind.ATTENTION: (4, 13), LayerKind.MLP: (6, 18)}
_CUT_LAUNCHES = {LayerKind.MAMBA: (12, 14), LayerKind.ATTENTION: (3, 6), LayerKind.MLP: (2, 3)}
_EXCHANGE_LAUNCHES, _EMBEDDING_LAUNCHES, _LOSS_LAUNCHES = (12, 28), 10, 50
# A gradient of e bytes is read and added to its fp32 buffer.
_ADDED_BYTES = 2 * FP32_BYTES


@dataclass(frozen=True)
class Moved(Summed):
    """Bytes of one pass, apart by why they move, and the kernels that it launches.

    `elementwise`: norms, gates, activations, convolution, the scan's inputs and residuals. `copies` only bring tensors
    into another order: around the context-parallel exchange, for attention, of weights that a slice keeps.
    `accumulation`: weight gradients added to their fp32 buffers.
    """

    elementwise: float = 0.0
    copies: float = 0.0
    accumulation: float = 0.0
    launches: float = 0.0

    @property
    def bytes(self) -> float:
        """Return all of them."""
        return self.elementwise + self.copies + self.accumulation


def stage_moved(run: MicroBatchWork, stage: int, *, sums_in_products: bool = True) -> dict[str, Moved]:
    """Count the passes of one micro-batch through one stage: the teacher's, forward, recompute, backward.

    A GPU's product adds to a weight's buffer itself (`sums_in_products`), a CPU's is added afterwards.
    """
    forward, teacher = (_layers(one, stage, backward=False) for one in (run, run.teacher))
    passes = {
        "teacher": teacher + _ends(run.teacher, stage, backward=False),
        "forward": forward + _ends(run, stage, backward=False),
    }
    if run.layout.recompute == "full":
        passes["recompute"] = forward
    elif run.layout.recompute == "selective":
        again = (_made_again(layer) * count for layer, count in run.distinct_layers(stage))
        passes["recompute"] = sum(again, Moved())
    backward = _layers(run, stage, backward=True) + _ends(run, stage, backward=True)
    passes["backward"] = backward + _accumulated(run, stage, sums_in_products)
    return passes


def _accumulated(run: MicroBatchWork, stage: int, sums_in_products: bool) -> Moved:
    """Count weight gradients on their way to the fp32 buffers: products' where the kept rows are not the first ones,
    and all of what is no product's weight: mostly the embedding's, as large as its weight though mostly zeros. The
    head's is summed by the loss."""
    elements = rank_parameters(run.parent, run.layout.tensor, run.layout.pipeline, stage)
    rest = sum(elements.values()) - sum(map(_projections, run.teacher.layers(stage)))
    is_last, tied = stage == run.layout.pipeline - 1, run.parent.tied_embeddings
    if is_last and not (tied and stage == 0):
        rest -= run.local_vocab * run.parent.hidden
    found = rest * (run.element_bytes + _ADDED_BYTES)
    if stage == 0:
        found += run.local_vocab * run.parent.hidden * run.element_bytes
    for layer, count in run.distinct_layers(stage):
        is_first = all(layer.cut.grid(kind).is_prefix for kind in PROJECTIONS[layer.kind])
        if not sums_in_products:
            found += count * _projections(layer) * (run.element_bytes + _ADDED_BYTES)
        elif not is_first:
            found += count * _projections(layer) * (FP32_BYTES + _ADDED_BYTES)
    return Moved(accumulation=found, launches=len(elements))


def _projections(layer: LayerWork) -> int:
    """Return the elements of both kept projections."""
    return (layer.rows + layer.inner) * layer.run.hidden


def _layers(run: MicroBatchWork, stage: int, backward: bool) -> Moved:
    return sum((layer_moved(layer, backward) * count for layer, count in run.distinct_layers(stage)), Moved())


def _ends(run: MicroBatchWork, stage: int, backward: bool) -> Moved:
    """Count the embedding on the first stage, the final norm on the last, and between stages a copy to full width."""
    stream, gathered = run.stream_bytes, run.gathered_bytes
    found = Moved(copies=2.0 * run.teacher.stream_bytes, launches=1)
    if stage == run.layout.pipeline - 1:
        found = Moved(elementwise=(2.0 + backward) * stream, launches=1 + backward)
    if stage == 0:  # ids of other ranks are masked
        gate = run.gates(Axis.HIDDEN) * (6 if backward else 2)
        found += Moved(
            elementwise=(2 if backward else 3) * gathered + (2 + gate) * stream, launches=_EMBEDDING_LAUNCHES
        )
    return found


def layer_moved(layer: LayerWork, backward: bool) -> Moved:
    """Count one pass of one layer, its gradients' accumulation left out."""
    run, e, stream = layer.run, layer.run.element_bytes, layer.run.stream_bytes
    inner = run.tokens * layer.inner * e
    # Without a gate the residual passes its gradient on; attention's gates multiply linear_proj's weight.
    is_gated = run.gates(Axis.HIDDEN, Axis.DEPTH) and layer.kind is not LayerKind.ATTENTION
    # Norm and residual; backward the norm's gradient is added to the residual's.
    elementwise, copies = (6 + 3 * is_gated if backward else 5) * stream, 0.0
    launches = _LAUNCHES[layer.kind][backward]
    match layer.kind:
        case LayerKind.MLP:
            elementwise += (3 if backward else 2) * inner
        case LayerKind.MAMBA:
            scan = layer.scan
            conv, around = scan.tokens * scan.conv * e, scan.tokens * (scan.rows - scan.inner) * e  # x B C dt
            y = scan.tokens * scan.inner * e
            elementwise += 3 * conv + 2 * (around + y) if backward else 2 * conv + around + y
            elementwise += (5 if backward else 3) * inner
            copies += _mamba_copies(layer, backward)
            launches += FUSED_LAUNCHES["scan"][backward]
            launches += _EXCHANGE_LAUNCHES[backward] if run.layout.context > 1 else 0
        case LayerKind.ATTENTION:
            keys_values = 2 * run.tokens * layer.local_kv * e
            elementwise += (4 if backward else 2) * inner + (2 if backward else 1) * keys_values
            if run.gates(Axis.ATTENTION_HEAD, Axis.HIDDEN, Axis.DEPTH):
                elementwise += layer.inner * run.hidden * _gated_weight_bytes(e, backward)
            copies += 2 * (inner + keys_values)
            launches += FUSED_LAUNCHES["attention"][backward] * run.layout.context
    if run.masked:
        launches += _MASK_LAUNCHES[layer.kind][backward]
    elif kept := copied_elements(layer.cut, layer.kind):  # their gradients are added where they belong
        copies += 0 if backward else 2 * kept * e
        launches += _CUT_LAUNCHES[layer.kind][backward]
    return Moved(elementwise, copies, launches=launches)


def _gated_weight_bytes(e: int, backward: bool) -> int:
    """Return what an element of a weight under gates moves: the gates' product is written and read, the gated weight
    written; backward again, then its gradient is added, multiplied by the weight, and summed both ways."""
    gated = 2 * FP32_BYTES + 2 * e
    return gated + 4 * FP32_BYTES + (2 * FP32_BYTES + e) + 2 * FP32_BYTES if backward else gated


def _made_again(layer: LayerWork) -> Moved:
    """Count what selective recompute does of a layer's forward pass: the steps between its products."""
    run, scan, e = layer.run, layer.scan, layer.run.element_bytes
    inner = run.tokens * layer.inner * e
    match layer.kind:
        case LayerKind.MLP:
            steps, launches = 2 * inner, 2
        case LayerKind.MAMBA:
            steps, launches = 2 * scan.tokens * scan.conv * e + 3 * inner, 3
        case LayerKind.ATTENTION:
            steps, launches = 0, 1
    return Moved(elementwise=2 * run.stream_bytes + steps, launches=launches)


def _mamba_copies(layer: LayerWork, backward: bool) -> float:
    """Count what a Mamba layer only rearranges: backward the parts of [x, B, C] and of [z, x, B, C, dt] are put
    together again.

    The exchange cuts the rows [z, x, B, C, dt] into their parts, puts those of all ranks together and the tokens in
    order, and the scan's output back; z of the rank's own tokens is taken from before, and has zeros for a gradient.
    """
    run, scan, e = layer.run, layer.scan, layer.run.element_bytes
    rows, y = (scan.tokens * size * e for size in (scan.rows, scan.inner))
    together = 2 * rows + 2 * scan.tokens * scan.conv * e if backward else 0
    if run.layout.context == 1:
        return together
    if not backward:
        return 6 * rows + 4 * y
    own = run.tokens * (4 * layer.rows + layer.inner) * e
    return together + 8 * rows + 5 * y + own


def loss_moved(run: MicroBatchWork, chunk_tokens: int) -> Moved:
    """Count the chunked loss: the logits of both models are written and read twice, in fp32, the gradient is written
    and read by two products; one of them reads and writes the head's gradient in fp32.
    """
    logits, head, chunks = run.tokens * run.local_vocab, run.local_vocab * run.hidden, num_chunks(run, chunk_tokens)
    return Moved(
        elementwise=logits * (2 * 3 * FP32_BYTES + 3 * run.element_bytes),
        accumulation=head * chunks * _ADDED_BYTES,
        launches=_LOSS_LAUNCHES * chunks,
    )


def num_chunks(run: MicroBatchWork, chunk_tokens: int) -> int:
    """Return how often the loss of a micro-batch reads both heads."""
    return -(-run.tokens // chunk_tokens)


def step_moved(run: MicroBatchWork, stage: int, shards: int) -> Moved:
    """Count what comes once a step: gradients set to zero, divided by the number of tokens and, by the ranks that
    share the optimizer's state, read for their norm and for Adam; which reads and writes a master and two moments.
    """
    size = sum(rank_parameters(run.parent, run.layout.tensor, run.layout.pipeline, stage).values())
    adam = 2 * FP32_BYTES + 3 * 2 * FP32_BYTES + run.element_bytes
    return Moved(elementwise=size * (3 * FP32_BYTES + adam / shards))
