"""RMS norm over the active columns of each group of a row, with what Mamba-2 multiplies in front of it, in one reading.

S sequence, B batch, I columns in G equal groups. u = x silu(z) gate, r = 1 / sqrt(sum_group u^2 / active + epsilon),
out = weight u r; active is given, or the sum of the group's gates. Backward, with h = weight dout, k = sum_group h u:
du = r h - r^3 k u / active, d active = r^3 k sum_group u^2 / (2 active^2). Nothing but the inputs is kept for it.
Tensors are bf16, fp16 or fp32, sums fp32. Imported only where Triton runs; the twin in plain PyTorch is in
`model/elementwise.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that share the rows of a group in the backward pass; each leaves one row of sums for weight and gate.
MAX_PROGRAMS = 256


@triton.jit
def norm_kernel(
    x,
    z,
    gate,
    weight,
    active,
    out,
    active_number,
    epsilon,
    batch,
    num_columns,
    x_stride_s,
    x_stride_b,
    z_stride_s,
    z_stride_b,
    HAS_Z: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program normalises one group of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    channel = group * num_columns + columns
    s = row // batch
    b = row % batch
    u = tl.load(x + s * x_stride_s + b * x_stride_b + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_Z:
        z_value = tl.load(z + s * z_stride_s + b * z_stride_b + channel, mask=inside, other=0.0).to(tl.float32)
        u *= z_value * tl.sigmoid(z_value)
    count = tl.load(active).to(tl.float32) if HAS_ACTIVE else active_number
    if HAS_GATE:
        g = tl.load(gate + channel, mask=inside, other=0.0).to(tl.float32)
        u *= g
        count = tl.sum(g, axis=0)
    r = tl.rsqrt(tl.sum(u * u, axis=0) / count + epsilon)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    row_start = out + row * num_columns * tl.num_programs(1)
    tl.store(row_start + channel, (u * r * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    x,
    z,
    gate,
    weight,
    active,
    grad_out,
    grad_x,
    grad_z,
    sums,
    active_number,
    epsilon,
    batch,
    num_rows,
    num_columns,
    x_stride_s,
    x_stride_b,
    z_stride_s,
    z_stride_b,
    HAS_Z: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes every n-th row of one group and leaves a row of sums: for weight, then gate, or else active."""
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    num_groups = tl.num_programs(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    channel = group * num_columns + columns
    width = num_columns * num_groups
    count = tl.load(active).to(tl.float32) if HAS_ACTIVE else active_number
    if HAS_GATE:
        count = tl.sum(tl.load(gate + channel, mask=inside, other=0.0).to(tl.float32), axis=0)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    if HAS_GATE:
        gate_sum = tl.zeros([BLOCK], tl.float32)
    active_sum = 0.0
    for row in range(program, num_rows, tl.num_programs(0)):
        s = row // batch
        b = row % batch
        x_value = tl.load(x + s * x_stride_s + b * x_stride_b + channel, mask=inside, other=0.0).to(tl.float32)
        if HAS_Z:
            z_value = tl.load(z + s * z_stride_s + b * z_stride_b + channel, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(z_value)
            ungated = x_value * z_value * sigmoid
        else:
            ungated = x_value
        u = ungated
        if HAS_GATE:
            g = tl.load(gate + channel, mask=inside, other=0.0).to(tl.float32)
            u = ungated * g
        square_sum = tl.sum(u * u, axis=0)
        r = tl.rsqrt(square_sum / count + epsilon)
        incoming = tl.load(grad_out + row * width + channel, mask=inside, other=0.0).to(tl.float32)
        h = incoming * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        k = tl.sum(h * u, axis=0)
        cubed = r * r * r
        grad_u = r * h - (cubed * k / count) * u
        weight_sum += incoming * u * r
        grad = grad_u
        if HAS_GATE:
            gate_sum += grad_u * ungated
            grad = grad_u * g
        active_sum += cubed * k * square_sum / (2.0 * count * count)
        if HAS_Z:
            slope = sigmoid * (1.0 + z_value * (1.0 - sigmoid))
            written = (grad * x_value * slope).to(grad_z.dtype.element_ty)
            tl.store(grad_z + row * width + channel, written, mask=inside)
            grad *= z_value * sigmoid
        tl.store(grad_x + row * width + channel, grad.to(grad_x.dtype.element_ty), mask=inside)
    row_of_sums = sums + program * (width * (1 + HAS_GATE) + num_groups * HAS_ACTIVE)
    tl.store(row_of_sums + channel, weight_sum, mask=inside)
    if HAS_GATE:  # which the divisor is a sum of, too
        tl.store(row_of_sums + width + channel, gate_sum + active_sum, mask=inside)
    if HAS_ACTIVE:
        tl.store(row_of_sums + width + group, active_sum)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, active: Tensor | float | None, epsilon: float, groups: int,
        z: Tensor | None, gate: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Normalise; keeps the inputs alone."""
        tensor = active if isinstance(active, Tensor) else None
        ctx.save_for_backward(x, weight, z, gate, tensor)
        ctx.number, ctx.epsilon, ctx.groups = float(active) if isinstance(active, int | float) else 1.0, epsilon, groups
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (columns, *strides), options = _launch(x, z, gate, tensor, groups)
        norm_kernel[(x.shape[0] * x.shape[1], groups)](
            *_pointers(x, z, gate, weight, tensor), out, ctx.number, epsilon, x.shape[1], columns, *strides, **options
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Read each row once more and return the gradients of x, weight, active, z and gate."""
        x, weight, z, gate, active = ctx.saved_tensors
        rows, width = x.shape[0] * x.shape[1], x.shape[2]
        programs = min(rows, max(1, MAX_PROGRAMS // ctx.groups))
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_z = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
        num_sums = width * (1 + (gate is not None)) + ctx.groups * (active is not None)
        sums = torch.empty(programs, num_sums, dtype=torch.float32, device=x.device)
        (columns, *strides), options = _launch(x, z, gate, active, ctx.groups)
        norm_backward_kernel[(programs, ctx.groups)](
            *_pointers(x, z, gate, weight, active), grads[0].contiguous(), grad_x, x if z is None else grad_z, sums,
            ctx.number, ctx.epsilon, x.shape[1], rows, columns, *strides, **options,
        )  # fmt: skip
        total = sums.sum(0)
        grad_weight, rest = total[:width].to(weight.dtype), total[width:]
        grad_gate = None if gate is None else rest.to(gate.dtype)
        grad_active = None
        if active is not None:
            grad_active = (rest if ctx.groups == 1 else rest.sum(0, keepdim=True)).view(active.shape).to(active.dtype)
        return grad_x, grad_weight, grad_active, None, None, grad_z, grad_gate


def gated_norm(
    x: Tensor,
    weight: Tensor,
    active: Tensor | float | None,
    epsilon: float,
    groups: int = 1,
    z: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Return weight * u / sqrt(sum_group(u^2) / active + epsilon), u = x silu(z) gate; all shapes [S, B, I], x's dtype.

    `x` and `z` may be rows of wider rows; weight and gate are [I]. `active`, of one group, is a number or one element;
    with a gate it is None: the sum of the group's gates.
    """
    assert x.dim() == 3 and x.stride(2) == 1 and (z is None or (z.shape == x.shape and z.stride(2) == 1))
    assert (active is None) == (gate is not None), "a gate says itself what is active"
    return _GatedNorm.apply(x, weight.contiguous(), active, epsilon, groups, z, gate)


def _pointers(
    x: Tensor, z: Tensor | None, gate: Tensor | None, weight: Tensor, active: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the kernel's inputs; what is absent is never read."""
    return x, x if z is None else z, weight if gate is None else gate, weight, weight if active is None else active


def _launch(
    x: Tensor, z: Tensor | None, gate: Tensor | None, active: Tensor | None, groups: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    columns = x.shape[2] // groups
    block = triton.next_power_of_2(columns)
    z_strides = (0, 0) if z is None else z.stride()[:2]
    flags = dict(HAS_Z=z is not None, HAS_GATE=gate is not None, HAS_ACTIVE=active is not None)
    return (columns, *x.stride()[:2], *z_strides), {**flags, "BLOCK": block, "num_warps": num_warps(block)}


def num_warps(block: int) -> int:
    """Return how many warps hold a row of `block` columns, 8 columns a thread where a program may have so many."""
    return min(16, max(1, block // 256))
