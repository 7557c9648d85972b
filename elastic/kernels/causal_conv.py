"""The causal depthwise convolution and its SiLU on rows of wider rows: strided, any number of channels, 2 to 4 taps.

B batch, L length, I channels, K taps. pre[t] = bias + sum_j weight[j] x[t - (K-1-j)], out = silu(pre). A tap that
reaches over the start of its document or sequence reads zero; in front of a sequence it reads `before`, if given.
Backward: dx[t] = sum_m weight[K-1-m] dpre[t+m], pre computed again from x. Tensors are bf16, fp16 or fp32, sums fp32.
Imported only where Triton runs; the twin in plain PyTorch is in `model/elementwise.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's tile; fewer tokens in the backward pass, which holds four times the values, so that registers suffice.
MOST_TAPS = 4  # a tap is rows of registers; published models have 4
TOKENS = 16
BACKWARD_TOKENS = 8
CHANNELS = 128
# Tokens of one program in the backward pass; each leaves one row of sums for the taps and the bias.
SPAN = 256


@triton.jit
def _reached(x, position, t, shift: tl.constexpr, length, stride, channels, inside, HAS_POSITION: tl.constexpr):
    """Load x[t - shift] for tokens t, zero where that lies in front of the sequence or of the document."""
    source = t - shift
    reached = inside & (source >= 0) & (t < length)
    if HAS_POSITION and shift > 0:
        reached = reached & (tl.load(position + t, mask=t < length, other=0) >= shift)
    return tl.load(x + source.to(tl.int64) * stride + channels, mask=reached, other=0.0).to(tl.float32)


@triton.jit
def conv_kernel(
    x,
    weight,
    bias,
    position,
    before,
    out,
    length,
    num_channels,
    x_stride_b,
    x_stride_l,
    TAPS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program writes TOKENS x CHANNELS of one sequence."""
    sequence = tl.program_id(2).to(tl.int64)
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = channels < num_channels
    pre = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32) + tl.zeros([TOKENS, CHANNELS], tl.float32)
    for shift in tl.static_range(TAPS):
        value = _reached(
            x + sequence * x_stride_b, position + sequence * length, t, shift, length, x_stride_l, channels, inside,
            HAS_POSITION,
        )  # fmt: skip
        if HAS_BEFORE and shift > 0:
            kept = before + (sequence * (TAPS - 1) + (TAPS - 1)) * num_channels
            earlier = inside & (t < shift)
            if HAS_POSITION:
                earlier = earlier & (tl.load(position + sequence * length + t, mask=t < length, other=0) >= shift)
            value += tl.load(kept + (t - shift) * num_channels + channels, mask=earlier, other=0.0).to(tl.float32)
        pre += value * tl.load(weight + channels * TAPS + (TAPS - 1 - shift), mask=inside, other=0.0).to(tl.float32)
    written = (pre * tl.sigmoid(pre)).to(out.dtype.element_ty)
    row = sequence * length + t
    tl.store(out + row * num_channels + channels, written, mask=inside & (t < length))


@triton.jit
def conv_backward_kernel(
    x,
    weight,
    bias,
    position,
    grad_out,
    grad_x,
    sums,
    length,
    num_channels,
    x_stride_b,
    x_stride_l,
    TAPS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):
    """One program walks down SPAN tokens of CHANNELS channels of one sequence."""
    sequence = tl.program_id(2).to(tl.int64)
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = channels < num_channels
    own_x = x + sequence * x_stride_b
    own_position = position + sequence * length
    own_grad = grad_out + sequence * length * num_channels
    own_bias = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * SPAN
    row = tl.arange(0, SUM_ROWS)[:, None]  # of the taps, then of the bias
    total = tl.zeros([SUM_ROWS, CHANNELS], tl.float32)
    for start in range(first, tl.minimum(first + SPAN, length), TOKENS):
        t = (start + tl.arange(0, TOKENS))[:, None]
        grad = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for ahead in tl.static_range(TAPS):
            later = t + ahead
            pre = own_bias + tl.zeros([TOKENS, CHANNELS], tl.float32)
            for tap in tl.static_range(TAPS):
                value = _reached(
                    own_x, own_position, later, TAPS - 1 - tap, length, x_stride_l, channels, inside, HAS_POSITION
                )
                pre += value * tl.load(weight + channels * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(pre)
            there = inside & (later < length)
            incoming = tl.load(own_grad + later.to(tl.int64) * num_channels + channels, mask=there, other=0.0)
            grad_pre = incoming.to(tl.float32) * sigmoid * (1.0 + pre * (1.0 - sigmoid))
            if ahead == 0:
                for tap in tl.static_range(TAPS):
                    value = _reached(
                        own_x, own_position, t, TAPS - 1 - tap, length, x_stride_l, channels, inside, HAS_POSITION
                    )
                    total += tl.where(row == tap, tl.sum(grad_pre * value, axis=0, keep_dims=True), 0.0)
                total += tl.where(row == TAPS, tl.sum(grad_pre, axis=0, keep_dims=True), 0.0)
            if HAS_POSITION and ahead > 0:
                same = tl.load(own_position + later, mask=later < length, other=0) >= ahead
                grad_pre = tl.where(same, grad_pre, 0.0)
            column = weight + channels * TAPS + (TAPS - 1 - ahead)
            grad += grad_pre * tl.load(column, mask=inside, other=0.0).to(tl.float32)
        there = inside & (t < length)
        written = grad_x + (sequence * length + t) * num_channels + channels
        tl.store(written, grad.to(grad_x.dtype.element_ty), mask=there)
    program = sequence * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + (program * (TAPS + 1) + row) * num_channels + channels, total, mask=inside & (row <= TAPS))


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None, before: Tensor | None
    ) -> Tensor:
        """Convolve; keeps the inputs alone."""
        ctx.save_for_backward(x, weight, bias, position)
        ctx.has_before = before is not None
        batch, length, channels = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS), batch)
        conv_kernel[grid](
            x, weight, bias, x if position is None else position, x if before is None else before, out, length,
            channels, *x.stride()[:2], TAPS=weight.shape[1], HAS_POSITION=position is not None,
            HAS_BEFORE=before is not None, TOKENS=TOKENS, CHANNELS=CHANNELS,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the convolution's input to SiLU again and return the gradients of x, weight and bias."""
        assert not ctx.has_before, "a convolution that goes on from earlier inputs is for inference"
        x, weight, bias, position = ctx.saved_tensors
        batch, length, channels = x.shape
        taps, spans = weight.shape[1], triton.cdiv(length, SPAN)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty(batch * spans, taps + 1, channels, dtype=torch.float32, device=x.device)
        conv_backward_kernel[(spans, triton.cdiv(channels, CHANNELS), batch)](
            x, weight, bias, x if position is None else position, grads[0].contiguous(), grad_x, sums, length, channels,
            *x.stride()[:2], TAPS=taps, HAS_POSITION=position is not None, TOKENS=BACKWARD_TOKENS, CHANNELS=CHANNELS,
            SPAN=SPAN, SUM_ROWS=8,
        )  # fmt: skip
        total = sums.sum(0).to(weight.dtype)
        return grad_x, total[:taps].t(), total[taps], None, None


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """Return silu(bias + sum_j weight[:, j] x[:, t - (K-1-j)]) of `x` [B, L, I], weight [I, K] and bias [I].

    `position` int32 [B, L] is each token's place in its document, over whose start no tap reaches. `before` [B, K-1, I]
    are the inputs in front of the first token, for inference: nothing is then differentiated.
    """
    assert x.dim() == 3 and x.stride(2) == 1 and 2 <= weight.shape[1] <= MOST_TAPS
    assert position is None or (position.dtype == torch.int32 and position.shape == x.shape[:2])
    start = None if position is None else position.contiguous()
    earlier = None if before is None else before.contiguous()
    return _CausalConv.apply(x, weight.contiguous(), bias.contiguous(), start, earlier)
