"""What gates multiply: squared ReLU x gate, and x + depth gate y; the gates' gradients are summed inside.

n rows, F columns. Tensors and gates are bf16, fp16 or fp32, arithmetic and sums fp32. Imported only where Triton
runs; the twins in plain PyTorch are in `model/elementwise.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
COLUMNS = 256
# Programs that share the rows of a block of columns in the backward pass; each leaves one row of sums for the gates.
MAX_PROGRAMS = 32


@triton.jit
def gated_kernel(
    y,
    gate,
    depth,
    x,
    out,
    num_rows,
    num_columns,
    y_stride,
    x_stride,
    SQUARED_RELU: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_DEPTH: tl.constexpr,
    HAS_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program writes one tile of [x +] depth gate f(y), f the squared ReLU or the identity."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    value = tl.load(y + rows * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SQUARED_RELU:
        value = tl.maximum(value, 0.0) * value
    if HAS_GATE:
        value *= tl.load(gate + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    if HAS_DEPTH:
        value *= tl.load(depth).to(tl.float32)
    if HAS_X:
        value += tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows * num_columns + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    y,
    gate,
    depth,
    grad_out,
    grad_y,
    sums,
    num_rows,
    num_columns,
    y_stride,
    SQUARED_RELU: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program walks down every n-th tile of a block of columns; `sums` are those of grad_out f(y)."""
    program = tl.program_id(0)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    wide_enough = columns < num_columns
    scale = tl.load(gate + columns, mask=wide_enough, other=0.0).to(tl.float32) if HAS_GATE else 1.0
    if HAS_DEPTH:
        scale *= tl.load(depth).to(tl.float32)
    column_sum = tl.zeros([1, COLUMNS], tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (rows < num_rows) & wide_enough
        value = tl.load(y + rows * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(grad_out + rows * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        if SQUARED_RELU:
            positive = tl.maximum(value, 0.0)
            slope = 2.0 * positive
            value = positive * positive
        else:
            slope = 1.0
        if HAS_GATE or HAS_DEPTH:
            column_sum += tl.sum(incoming * value, axis=0, keep_dims=True)
        grad = (incoming * scale * slope).to(grad_y.dtype.element_ty)
        tl.store(grad_y + rows * num_columns + columns, grad, mask=inside)
    if HAS_GATE or HAS_DEPTH:
        tl.store(sums + program * num_columns + columns, column_sum, mask=wide_enough)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor | None, depth: Tensor | None, x: Tensor | None, relu: bool) -> Tensor:
        """Return [x +] depth gate f(y) of rows [n, F]; keeps y, where its gradient needs it, and the gates."""
        has_gates = gate is not None or depth is not None
        ctx.save_for_backward(y if relu or has_gates else None, gate, depth)
        ctx.relu, ctx.has_x = relu, x is not None
        out = torch.empty(y.shape, dtype=y.dtype if x is None else x.dtype, device=y.device)
        tiles = (triton.cdiv(y.shape[0], ROWS), triton.cdiv(y.shape[1], COLUMNS))
        gated_kernel[tiles](
            y, y if gate is None else gate, y if depth is None else depth, y if x is None else x, out, *y.shape,
            y.stride(0), 0 if x is None else x.stride(0), SQUARED_RELU=relu, HAS_GATE=gate is not None,
            HAS_DEPTH=depth is not None, HAS_X=x is not None, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of y, gate, depth and x; x's is the incoming one."""
        y, gate, depth = ctx.saved_tensors
        grad_out, grad_x = grads[0].contiguous(), grads[0] if ctx.has_x else None
        if y is None:  # a plain sum
            return grad_out, None, None, grad_x, None
        programs = min(MAX_PROGRAMS, triton.cdiv(y.shape[0], ROWS))
        grad_y, has_gates = torch.empty(y.shape, dtype=y.dtype, device=y.device), gate is not None or depth is not None
        sums = torch.empty(programs if has_gates else 0, y.shape[1], dtype=torch.float32, device=y.device)
        gated_backward_kernel[(programs, triton.cdiv(y.shape[1], COLUMNS))](
            y, y if gate is None else gate, y if depth is None else depth, grad_out, grad_y, sums, *y.shape,
            y.stride(0), SQUARED_RELU=ctx.relu, HAS_GATE=gate is not None, HAS_DEPTH=depth is not None, ROWS=ROWS,
            COLUMNS=COLUMNS,
        )  # fmt: skip
        grad_gate = grad_depth = None
        if has_gates:
            by_column = sums.sum(0)
            if gate is not None:
                grad_gate = (by_column if depth is None else by_column * depth).to(gate.dtype)
            if depth is not None:
                grad_depth = (by_column.sum() if gate is None else torch.dot(by_column, gate.float())).to(depth.dtype)
        return grad_y, grad_gate, grad_depth, grad_x, None


def squared_relu(x: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return relu(x)^2 gate of `x` [..., F] and gate [F]."""
    return _Gated.apply(_rows(x), gate, None, None, True).view(x.shape)


def residual(x: Tensor, y: Tensor, depth: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    """Return x + depth hidden y of `x` and `y` [..., D], one number and a gate [D], in x's dtype."""
    return _Gated.apply(_rows(y), hidden, depth, _rows(x), False).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """Return `x` [..., F] as rows [n, F], maybe of wider rows; copies only what cannot be seen so."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()
