"""Floating-point operations of a step: matrix products only, a multiply and an add are two.

Norms, activations, gates and the convolution's taps are left out, as torch's FlopCounterMode leaves them out and as
Megatron-Core does in its own count. The letters are those of `work`.
"""

from dataclasses import dataclass, replace

from elastic.plan.activations import FUSED_CHUNK_TOKENS, TORCH_CHUNK_TOKENS
from elastic.plan.work import KernelSet, LayerWork, MicroBatchWork, ScanSizes, distinct
from elastic.space.axes import LayerKind
from elastic.space.gates import Execution
from elastic.space.shape import Subnet


@dataclass(frozen=True)
class Flops:
    """One rank's products of one pass over one micro-batch, apart because they run at different speeds."""

    matmul: float = 0.0
    scan: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """Return all of them."""
        return self.matmul + self.scan + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.matmul + other.matmul, self.scan + other.scan, self.attention + other.attention)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.matmul * factor, self.scan * factor, self.attention * factor)


def layer_flops(layer: LayerWork) -> Flops:
    """Count one rank's forward pass of one layer."""
    run = layer.run
    projections = 2.0 * run.tokens * run.hidden * (layer.column_rows + layer.row_columns)
    match layer.kind:
        case LayerKind.MAMBA:
            return Flops(projections, scan=scan_flops(layer.scan, run.kernels))
        case LayerKind.ATTENTION:
            return Flops(projections, attention=attention_flops(layer))
        case LayerKind.MLP:
            return Flops(projections)


def scan_flops(scan: ScanSizes, kernels: KernelSet) -> float:
    """Count the chunked scan (arXiv 2405.21060, section 6): C B^T and its product with x inside chunks of Q tokens,
    the chunks' states, and what states add to later chunks.

    mamba-ssm's chunks are longer than the PyTorch scan's.
    """
    q = TORCH_CHUNK_TOKENS if kernels is KernelSet.TORCH else FUSED_CHUNK_TOKENS
    tokens = scan.padded_tokens(q)
    return 2.0 * tokens * (q * scan.groups * scan.state + q * scan.inner + 2 * scan.state * scan.inner)


def attention_flops(layer: LayerWork) -> float:
    """Count scores and context.

    The fused kernels leave out what the causal mask hides, half of it, alike on all context ranks; PyTorch's
    unfused products, which the counter sees on a CPU, do not.
    """
    run = layer.run
    keys = run.length_tokens / (2 if run.kernels is KernelSet.FUSED else 1)
    return 4.0 * run.tokens * keys * layer.inner


# Backward over forward: both gradients of a product. Flash attention computes the scores again (FlashAttention 2,
# arXiv 2307.08691, section 3.2: 5 products where the forward pass has 2), and so does mamba-ssm's scan.
_FUSED_ATTENTION_BACKWARD, _FUSED_SCAN_BACKWARD = 2.5, 2.5


def backward_flops(forward: Flops, kernels: KernelSet) -> Flops:
    """Count the backward pass of layers whose forward pass is `forward`."""
    if kernels is KernelSet.TORCH:
        return forward * 2.0
    return Flops(
        forward.matmul * 2.0, forward.scan * _FUSED_SCAN_BACKWARD, forward.attention * _FUSED_ATTENTION_BACKWARD
    )


@dataclass(frozen=True)
class StageFlops:
    """One rank's work on one micro-batch. The loss's head products are all done in its forward pass."""

    teacher: Flops
    forward: Flops
    recompute: Flops
    backward: Flops
    head: Flops

    @property
    def total(self) -> Flops:
        """Return all of it."""
        return self.teacher + self.forward + self.recompute + self.backward + self.head


def stage_flops(run: MicroBatchWork, stage: int) -> StageFlops:
    """Count one rank of one stage: the teacher's pass over the whole parent, then the student's."""
    teacher = _sum(whole_parent(run).layers(stage))
    forward = _sum(run.layers(stage))
    head = Flops()
    if stage == run.layout.pipeline - 1:
        # Student's logits and its two gradients at the kept width, the teacher's logits at the full one.
        head = Flops(2.0 * run.tokens * run.local_vocab * (3 * run.hidden + run.parent.hidden))
    recompute = forward if run.layout.recompute else Flops()
    return StageFlops(teacher, forward, recompute, backward_flops(forward, run.kernels), head)


def whole_parent(run: MicroBatchWork) -> MicroBatchWork:
    """Return the same micro-batch through the uncut parent, which the teacher runs."""
    return replace(run, execution=Execution.SLICE, subnet=Subnet.full(run.parent))


def _sum(layers: tuple[LayerWork, ...]) -> Flops:
    return sum((layer_flops(layer) * count for layer, count in distinct(layers)), Flops())
