"""Floating-point operations of a step: matrix products only, a multiply and an add are two.

Norms, activations, gates and the convolution's taps are left out, as torch's FlopCounterMode leaves them out and as
Megatron-Core does in its own count. The letters are those of `work`.
"""

from dataclasses import dataclass, replace

from elastic.plan.work import KernelSet, LayerWork, MicroBatchWork, ScanSizes, Summed
from elastic.space.axes import LayerKind
from elastic.space.cost import shape_cost
from elastic.world.groups import Layout

# Backward over forward: both gradients of a product. Flash attention computes the scores again (FlashAttention 2,
# arXiv 2307.08691, section 3.2: 5 products where the forward pass has 2), and so does mamba-ssm's scan.
_BACKWARD, _FUSED_BACKWARD = 2.0, 2.5


@dataclass(frozen=True)
class Flops(Summed):
    """One rank's products of one pass over one micro-batch, apart because they run at different speeds."""

    matmul: float = 0.0
    scan: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """Return all of them."""
        return self.matmul + self.scan + self.attention


def layer_flops(layer: LayerWork) -> Flops:
    """Count one rank's forward pass of one layer."""
    run = layer.run
    return Flops(
        matmul=2.0 * run.tokens * run.hidden * (layer.rows + layer.inner),
        scan=scan_flops(layer.scan, run.kernels) if layer.kind is LayerKind.MAMBA else 0.0,
        attention=attention_flops(layer) if layer.kind is LayerKind.ATTENTION else 0.0,
    )


def scan_flops(scan: ScanSizes, kernels: KernelSet) -> float:
    """Count the chunked scan (arXiv 2405.21060, section 6): C B^T and its product with x inside chunks of Q tokens,
    the chunks' states, and what states add to later chunks.

    mamba-ssm's chunks are longer than the PyTorch scan's.
    """
    q, tokens = kernels.chunk_tokens, scan.padded_tokens(kernels.chunk_tokens)
    return 2.0 * tokens * (q * scan.groups * scan.state + q * scan.inner + 2 * scan.state * scan.inner)


def attention_flops(layer: LayerWork) -> float:
    """Count scores and context.

    The fused kernels leave out what the causal mask hides, half of it, alike on all context ranks; PyTorch's
    unfused products, which the counter sees on a CPU, do not.
    """
    run = layer.run
    keys = run.length_tokens / (2 if run.kernels is KernelSet.FUSED else 1)
    return 4.0 * run.tokens * keys * layer.inner


def forward_flops(run: MicroBatchWork, stage: int) -> Flops:
    """Count one rank's forward pass of the layers of one stage."""
    return sum((layer_flops(layer) * count for layer, count in run.distinct_layers(stage)), Flops())


def backward_flops(forward: Flops, kernels: KernelSet) -> Flops:
    """Count the backward pass of layers whose forward pass is `forward`."""
    again = _FUSED_BACKWARD if kernels is KernelSet.FUSED else _BACKWARD
    return Flops(forward.matmul * _BACKWARD, forward.scan * again, forward.attention * again)


def pass_flops(run: MicroBatchWork, stage: int) -> dict[str, Flops]:
    """Count one rank of one stage on one micro-batch: the teacher's pass, the student's two, recompute, the loss."""
    forward = forward_flops(run, stage)
    passes = {"teacher": forward_flops(run.teacher, stage), "forward": forward}
    if run.layout.recompute == "full":
        passes["recompute"] = forward
    passes["backward"] = backward_flops(forward, run.kernels)
    if stage == run.layout.pipeline - 1:
        # Student's logits and its two gradients at the kept width, the teacher's logits at the full one.
        passes["loss"] = Flops(2.0 * run.tokens * run.local_vocab * (3 * run.hidden + run.parent.hidden))
    return passes


def stage_flops(run: MicroBatchWork, stage: int) -> Flops:
    """Add up all passes of one rank of one stage on one micro-batch."""
    return sum(pass_flops(run, stage).values(), Flops())


def model_flops(run: MicroBatchWork) -> float:
    """Return 6 N T + attention of the student on one micro-batch, all ranks together: what MFU counts.

    N are the parameters that are computed, an embedding that only looks up left out; attention is causal, so half of
    all pairs, as Megatron-Core counts it. Neither the teacher, nor the scan beyond its projections, nor recompute.
    """
    shape = run.parent if run.masked else run.subnet.shape(run.parent)
    parameters = float(shape_cost(shape).params) - (0 if shape.tied_embeddings else shape.vocab * shape.hidden)
    whole = replace(run, layout=Layout())
    attention = sum(
        attention_flops(layer) * count for layer, count in whole.distinct_layers(0) if layer.kind is LayerKind.ATTENTION
    )
    return 6.0 * parameters * whole.tokens + 3 * attention
