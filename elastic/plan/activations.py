"""What one layer keeps for its backward pass, tensor by tensor, and what the backward pass needs beside it.

Read off `elastic.model` and the two kernel sets; tests/distributed/test_plan.py holds it against live tensors. e is
the bytes of an element; a half-precision norm works on an fp32 copy, which it keeps. The letters are those of `work`.
"""

from functools import cache

import torch

from elastic.plan.work import FP32_BYTES, PROJECTIONS, KernelSet, LayerWork, MicroBatchWork, ScanSizes
from elastic.space.axes import Axis, LayerKind
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut, take

TORCH_CHUNK_TOKENS = 64  # TorchStateSpace
FUSED_CHUNK_TOKENS = 256  # MambaSsmStateSpace


def saved_bytes(layer: LayerWork) -> int:
    """Return the bytes a layer keeps for backward without recompute."""
    run, e = layer.run, layer.run.element_bytes
    terms = {"norm": _norm(run.stream_tokens * run.hidden, run.stream_tokens, e)}
    match layer.kind:
        case LayerKind.MAMBA:
            terms |= _mamba(layer)
        case LayerKind.ATTENTION:
            terms |= _attention(layer)
        case LayerKind.MLP:
            # relu's result (which the square also keeps), and the gated square, which fc2 keeps
            terms["neurons"] = 2 * run.tokens * layer.inner * e
            if run.gates(Axis.FFN):  # the gate keeps what it multiplies
                terms["gate"] = run.tokens * layer.inner * e
    if run.gates(Axis.HIDDEN, Axis.DEPTH):  # the residual gate keeps the layer's output
        terms["output"] = run.stream_bytes
    if not run.masked:
        terms["weight copies"] = _copied_elements(layer.cut, layer.kind) * e
    return sum(terms.values())


def _norm(channels: int, rows: int, e: int) -> int:
    """Bytes of a gated norm: x in fp32, the normalised x, the weighted x that the projection keeps, and statistics."""
    return channels * (FP32_BYTES + 2 * e) + rows * 2 * FP32_BYTES


def _mamba(layer: LayerWork) -> dict[str, int]:
    """Bytes of a Mamba mixer: convolution, scan, gate and group norm."""
    run, scan, e = layer.run, layer.scan, layer.run.element_bytes
    inner = run.tokens * layer.inner
    return {
        "z x B C dt": scan.tokens * scan.rows * e,  # silu keeps z, a view that keeps all of it
        "convolution": _conv(scan, run),
        "dt": scan.tokens * scan.heads * FP32_BYTES,  # softplus keeps its input
        "scan": _torch_scan(scan, e) if run.kernels is KernelSet.TORCH else _fused_scan(scan, e),
        "z gate": inner * e * (2 if run.kernels is KernelSet.TORCH else 1),
        "group norm": _norm(inner, run.tokens * layer.local_groups, e),
        # Channels, then heads: each gate keeps what it multiplies.
        "gate": (run.gates(Axis.MAMBA_CHANNEL) + run.gates(Axis.MAMBA_HEAD)) * inner * e,
    }


def _conv(scan: ScanSizes, run: MicroBatchWork) -> int:
    """Bytes of the convolution beside its output.

    Torch: the padded input, and the sum of the taps before SiLU. Fused: causal-conv1d keeps its input, a view of
    in_proj's output, or a copy where rows are not a multiple of 8 (MambaSsmStateSpace.causal_conv).
    """
    e = run.element_bytes
    if run.kernels is KernelSet.TORCH:
        padding = scan.batch * (run.parent.conv_kernel - 1)
        return (2 * scan.tokens + padding) * scan.conv * e
    return 0 if scan.rows % 8 == 0 and scan.conv % 8 == 0 else scan.tokens * scan.conv * e


def _torch_scan(scan: ScanSizes, e: int) -> int:
    """Bytes of TorchStateSpace.scan, its input from the convolution included.

    Per token and head: the decay between all pairs of a chunk in fp32 (and e), the scores; B and C repeated for every
    head by the batched products.
    """
    q, wide = TORCH_CHUNK_TOKENS, FP32_BYTES
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

    Its autograd function keeps out, x, dt, dA_cumsum, A, B, C and D; chunk states are computed again in backward.
    """
    tokens = scan.padded_tokens(FUSED_CHUNK_TOKENS)
    return scan.tokens * (scan.conv + scan.inner) * e + (scan.tokens + tokens) * scan.heads * FP32_BYTES


def fused_scan_workspace_bytes(scan: ScanSizes, e: int) -> int:
    """Return what mamba_chunk_scan_combined's backward pass allocates at once (ssd_combined.py, same source).

    Chunk states and their gradients in fp32 and in e, C B^T of every chunk in fp32, gradients of x, B, C (fp32 sums)
    and dt.
    """
    tokens, q = scan.padded_tokens(FUSED_CHUNK_TOKENS), FUSED_CHUNK_TOKENS
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
    terms["context"] = query if run.gates(Axis.ATTENTION_HEAD) else 0  # the gated output, which linear_proj keeps
    if run.kernels is KernelSet.FUSED:
        terms["k v"] = keys_values
    elif run.layout.context == 1:
        terms["k v"] = query + keys_values
    else:
        whole = run.layout.context * run.tokens
        terms["k v"] = keys_values * run.layout.context
        terms["mask"] = run.tokens // run.batch * (whole // run.batch) * (1 + e)
    return terms


@cache
def _copied_elements(cut: Cut, kind: LayerKind) -> int:
    """Count the weights a slice copies, because their kept rows do not lie in one run.

    Asks the code that cuts them, on tensors without storage.
    """
    rows, columns = PROJECTIONS[kind]
    copied = 0
    for kinds in ((rows, DimKind.HIDDEN), (DimKind.HIDDEN, columns)):
        layouts = [cut.grid(dim) for dim in kinds]
        weight = torch.empty([layout.full_size for layout in layouts], device="meta")
        kept = weight
        for dim, layout in reversed(list(enumerate(layouts))):
            kept = take(kept, dim, layout)
        copied += 0 if kept._base is weight or kept is weight else kept.numel()
    return copied
