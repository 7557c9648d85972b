"""State-space backends: the causal convolution and the Mamba-2 scan, in plain PyTorch or with mamba-ssm's kernels.

Shapes: B batch, L length, C chunks of Q tokens, G groups, R heads of a group, H = G*R heads, P channels, N state.
The scan ("Transformers are SSMs", arXiv 2405.21060): S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t.
"""

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class StateSpaceBackend(Protocol):
    """The two operations of a Mamba-2 mixer that need a kernel on a GPU.

    Both start a sequence, or go on with one where `before` and `state` end, which are moved on in place: for inference,
    nothing is differentiated then.
    """

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
        """Convolve `x` [B, L, I] with depthwise taps `weight` [I, k], add `bias` [I], apply SiLU.

        `before` [B, k-1, I] are the inputs before `x`; None: zeros.
        """

    def scan(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """Run the recurrence: x [B,L,H,P], dt [B,L,H] after softplus, a [H] < 0, b and c [B,L,G,N], d [H].

        `state` [B,H,P,N], at least fp32, is that before `x`; None: zeros. One token takes one step from it, without
        filling up a chunk.
        """


class TorchStateSpace:
    """Chunked scan and shifted multiply-adds in PyTorch; runs anywhere, any dtype."""

    def __init__(self, chunk_tokens: int = 64) -> None:
        self.chunk_tokens = chunk_tokens

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
        """Convolve as k shifted multiply-adds, faster on a CPU than conv1d."""
        length, taps = x.shape[1], weight.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0)) if before is None else _joined(before, x)
        y = torch.addcmul(bias, padded[:, :length], weight[:, 0])
        for tap in range(1, taps):
            y = torch.addcmul(y, padded[:, tap : tap + length], weight[:, tap])
        return F.silu(y)

    def scan(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """Scan in chunks of Q tokens: matrix products inside a chunk, a short recurrence between chunks."""
        length = x.shape[1]
        if state is not None and length == 1:
            return _step(x, dt, a, b, c, d, state)
        q = self.chunk_tokens if state is None else min(self.chunk_tokens, length)
        x_padded, dt, b, c = (_pad_length(t, -length % q) for t in (x, dt, b, c))
        groups = b.shape[2]
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt, a = dt.to(wide), a.to(wide)

        def chunked(t: Tensor, *last: int) -> Tensor:  # [B, C*Q, G*R, ...] -> [B, C, G, R, Q, ...]
            return t.view(t.shape[0], -1, q, groups, t.shape[2] // groups, *last).permute(
                0, 1, 3, 4, 2, *range(5, 5 + len(last))
            )

        # 1. Cumulative log-decay inside each chunk [B,C,G,R,Q], and inputs scaled by dt.
        decay = chunked(dt * a).cumsum(-1)
        x_dt = chunked(x_padded * dt.unsqueeze(-1).to(x.dtype), x.shape[-1])
        b_chunk, c_chunk = (t.unflatten(1, (-1, q)).transpose(2, 3) for t in (b, c))  # [B,C,G,Q,N]
        # 2. Inside a chunk: y_i = sum_{j<=i} (C_i . B_j) exp(decay_i - decay_j) dt_j x_j.
        above = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
        between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(above, float("-inf")).exp().to(x.dtype)
        scores = (c_chunk @ b_chunk.transpose(-1, -2)).unsqueeze(3) * between
        y = scores @ x_dt
        # 3. What each chunk adds to the state [B,C,G,R,P,N], then the recurrence from chunk to chunk.
        to_end = (decay[..., -1:] - decay).exp().to(x.dtype)
        added = (x_dt * to_end.unsqueeze(-1)).transpose(-1, -2) @ b_chunk.unsqueeze(3)
        chunk_decay = decay[..., -1].exp()[..., None, None]
        carried = torch.zeros_like(added[:, 0], dtype=wide)
        if state is not None:
            carried = state.to(wide).unflatten(1, (groups, -1))
        states = []
        for index in range(added.shape[1]):
            states.append(carried)
            carried = carried * chunk_decay[:, index] + added[:, index]
        before = torch.stack(states, dim=1).to(x.dtype)
        if state is not None:
            state.copy_(carried.flatten(1, 2))
        # 4. What earlier chunks contribute through the state.
        y = y + (c_chunk.unsqueeze(3) @ before.transpose(-1, -2)) * decay.exp().unsqueeze(-1).to(x.dtype)
        y = y.permute(0, 1, 4, 2, 3, 5).reshape(x_padded.shape)[:, :length]
        return y + x * d.to(x.dtype).unsqueeze(-1)


class MambaSsmStateSpace:
    """mamba-ssm's and causal-conv1d's Triton / CUDA kernels."""

    def __init__(self, chunk_tokens: int = 256) -> None:
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        self.chunk_tokens, self._conv, self._scan = chunk_tokens, causal_conv1d_fn, mamba_chunk_scan_combined
        self._conv_step, self._scan_step = causal_conv1d_update, selective_state_update

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
        """Convolve with causal-conv1d, which wants channels before length; a next token with its update kernel."""
        if before is not None and x.shape[1] == 1:
            channels_first = before.transpose(1, 2)  # a view: the kernel (1.4) moves the inputs on in place
            y = self._conv_step(x[:, 0].contiguous(), channels_first, weight.contiguous(), bias, activation="silu")
            return y.unsqueeze(1)
        rows = (x if before is None else _joined(before, x)).transpose(1, 2)
        if any(size % 8 for size in (rows.shape[1], rows.stride(0), rows.stride(2))):
            # Its kernel for rows of channels moves 8 channels at a time; the other one wants rows of tokens.
            rows = rows.contiguous()
        y = self._conv(rows, weight.contiguous(), bias, activation="silu").transpose(1, 2)
        return y if before is None else y[:, before.shape[1] :]

    def scan(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """Scan with mamba-ssm's chunked kernel, one next token with its update kernel; both without their softplus."""
        a, d = a.float(), d.float()
        in_chunks = partial(self._scan, chunk_size=self.chunk_tokens, D=d, dt_softplus=False)
        if state is None:
            return in_chunks(x, dt, a, b, c)
        if x.shape[1] > 1:
            y, final = in_chunks(x, dt, a, b, c, initial_states=state, return_final_states=True)
            state.copy_(final)
            return y
        channels, num_states = state.shape[2:]
        # What all channels of a head share is expanded with stride 0, by which the kernel knows it. It asks the bias of
        # dt for its stride too, so zeros are passed although dt is finished.
        y = self._scan_step(
            state,
            x[:, 0].contiguous(),
            dt[:, 0].unsqueeze(-1).expand(-1, -1, channels),
            a[:, None, None].expand(-1, channels, num_states),
            b[:, 0].contiguous(),
            c[:, 0].contiguous(),
            d[:, None].expand(-1, channels),
            dt_bias=torch.zeros_like(a)[:, None].expand(-1, channels),
            dt_softplus=False,
        )
        return y.unsqueeze(1)


def _joined(before: Tensor, x: Tensor) -> Tensor:
    """Put the inputs before in front of the next ones, and move `before` on to the last of both."""
    joined = torch.cat([before, x], dim=1)
    before.copy_(joined[:, joined.shape[1] - before.shape[1] :])
    return joined


def _step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> Tensor:
    """Take one step of the recurrence, in the state's precision: x [B,1,H,P], dt [B,1,H], b and c [B,1,G,N]."""
    wide, groups = state.dtype, b.shape[2]
    by_group = state.unflatten(1, (groups, -1))  # [B,G,R,P,N], a view
    dt_now = dt[:, 0].to(wide).unflatten(1, (groups, -1))  # [B,G,R]
    x_now = x[:, 0].to(wide).unflatten(1, (groups, -1))  # [B,G,R,P]
    b_now, c_now = (t[:, 0].to(wide)[:, :, None] for t in (b, c))  # [B,G,1,N]
    decay = (dt_now * a.to(wide).view(groups, -1)).exp()
    by_group.mul_(decay[..., None, None])
    by_group.addcmul_((x_now * dt_now.unsqueeze(-1)).unsqueeze(-1), b_now.unsqueeze(-2))
    y = (by_group * c_now.unsqueeze(-2)).sum(-1).flatten(1, 2).unsqueeze(1).to(x.dtype)  # [B,1,H,P]
    return y + x * d.to(x.dtype).unsqueeze(-1)


def _pad_length(t: Tensor, padding: int) -> Tensor:
    """Append `padding` zero tokens; dt = 0 there leaves the state untouched."""
    return t if padding == 0 else F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
