"""The Mamba-2 scan, in plain PyTorch or with mamba-ssm's kernels.

Shapes: B batch, L length, C chunks of Q tokens, G groups, R heads of a group, H = G*R heads, P channels, N state.
The scan ("Transformers are SSMs", arXiv 2405.21060): S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


class TorchStateSpace:
    """Chunked scan in PyTorch; runs anywhere, any dtype."""

    def __init__(self, chunk_tokens: int = 64) -> None:
        self.chunk_tokens = chunk_tokens

    def scan(
        self,
        x: Tensor,
        dt: Tensor,
        dt_bias: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        state: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Run the recurrence at softplus(dt + dt_bias), in chunks of Q tokens.

        x [B,L,H,P], dt [B,L,H], dt_bias, a < 0 and d [H], b and c [B,L,G,N]. `state` [B,H,P,N], at least fp32, is that
        before `x` (None: zeros) and is moved on in place, for inference: nothing is differentiated then. One token
        takes one step from it, without filling up a chunk. `documents` int32 [B,L] is the number of each token's
        document in its row: a token hears its own document alone.
        """
        assert state is None or documents is None, "a decoded sequence is one document"
        length, wide = x.shape[1], torch.promote_types(dt.dtype, torch.float32)
        dt, a = F.softplus(dt.to(wide) + dt_bias.to(wide)), a.to(wide)
        if state is not None and length == 1:
            return _step(x, dt, a, b, c, d, state)
        q = self.chunk_tokens if state is None else min(self.chunk_tokens, length)
        x_padded, dt, b, c = (_pad_length(t, -length % q) for t in (x, dt, b, c))
        groups = b.shape[2]

        # 1. Decays inside each chunk, and inputs scaled by dt.
        between, to_end, from_start = _decays(dt * a, q, groups, documents)
        x_dt = _chunked(x_padded * dt.unsqueeze(-1).to(x.dtype), q, groups, x.shape[-1])
        b_chunk, c_chunk = (t.unflatten(1, (-1, q)).transpose(2, 3) for t in (b, c))  # [B,C,G,Q,N]
        # 2. Inside a chunk: y_i = sum_{j<=i} (C_i . B_j) exp(decay_i - decay_j) dt_j x_j.
        scores = (c_chunk @ b_chunk.transpose(-1, -2)).unsqueeze(3) * between.to(x.dtype)
        y = scores @ x_dt
        # 3. What each chunk adds to the state [B,C,G,R,P,N], then the recurrence from chunk to chunk.
        added = (x_dt * to_end.to(x.dtype).unsqueeze(-1)).transpose(-1, -2) @ b_chunk.unsqueeze(3)
        chunk_decay = from_start[..., -1, None, None]
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
        y = y + (c_chunk.unsqueeze(3) @ before.transpose(-1, -2)) * from_start.unsqueeze(-1).to(x.dtype)
        y = y.permute(0, 1, 4, 2, 3, 5).reshape(x_padded.shape)[:, :length]
        return y + x * d.to(x.dtype).unsqueeze(-1)


class MambaSsmStateSpace(TorchStateSpace):
    """mamba-ssm's Triton kernels."""

    def __init__(self, chunk_tokens: int = 256) -> None:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        super().__init__(chunk_tokens)
        self._scan, self._step = mamba_chunk_scan_combined, selective_state_update

    def scan(
        self,
        x: Tensor,
        dt: Tensor,
        dt_bias: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        state: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Scan with mamba-ssm's chunked kernel, one next token with its update kernel."""
        a, d, dt_bias = a.float(), d.float(), dt_bias.float()
        in_chunks = partial(self._scan, chunk_size=self.chunk_tokens, D=d, dt_bias=dt_bias, dt_softplus=True)
        assert state is None or documents is None, "a decoded sequence is one document"
        if state is None:
            return in_chunks(x, dt, a, b, c, seq_idx=documents)
        if x.shape[1] > 1:
            y, final = in_chunks(x, dt, a, b, c, initial_states=state, return_final_states=True)
            state.copy_(final)
            return y
        channels, num_states = state.shape[2:]
        # What all channels of a head share is expanded with stride 0, by which the kernel knows it.
        y = self._step(
            state,
            x[:, 0].contiguous(),
            dt[:, 0].unsqueeze(-1).expand(-1, -1, channels),
            a[:, None, None].expand(-1, channels, num_states),
            b[:, 0].contiguous(),
            c[:, 0].contiguous(),
            d[:, None].expand(-1, channels),
            dt_bias=dt_bias[:, None].expand(-1, channels),
            dt_softplus=True,
        )
        return y.unsqueeze(1)


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


def _chunked(t: Tensor, q: int, groups: int, *last: int) -> Tensor:
    """View [B, C*Q, G*R, ...] as [B, C, G, R, Q, ...]."""
    heads = t.view(t.shape[0], -1, q, groups, t.shape[2] // groups, *last)
    return heads.permute(0, 1, 3, 4, 2, *range(5, 5 + len(last)))


def _decays(rate: Tensor, q: int, groups: int, documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(sum of dt A [B,C*Q,H]) from token to token [B,C,G,R,Q,Q], to the chunk's end, and from its start.

    Zero where one does not hear the other: it is later, or of another document [B, L].
    """
    later = torch.ones(q, q, dtype=torch.bool, device=rate.device).triu(1)
    if documents is None:
        decay = _chunked(rate, q, groups).cumsum(-1)
        from_start, to_end = decay, decay[..., -1:] - decay
    else:
        own = _pad_length(documents, -documents.shape[1] % q).unflatten(1, (-1, q))  # [B,C,Q]
        later = later | (own.unsqueeze(-1) != own.unsqueeze(-2))
        # A product with zeros: in differences of one running sum, documents would hear each other's rounding.
        decay = _chunked(((~later).to(rate.dtype) @ rate.unflatten(1, (-1, q))).flatten(1, 2), q, groups)
        own, later = (t[:, :, None, None] for t in (own, later))
        last_before = F.pad(own[..., -1:], (0, 0) * 3 + (1, 0))[:, :-1]
        from_start = decay.masked_fill(own != last_before, float("-inf"))
        to_end = (decay[..., -1:] - decay).masked_fill(own != own[..., -1:], float("-inf"))
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, float("-inf"))
    return between.exp(), to_end.exp(), from_start.exp()


def _pad_length(t: Tensor, padding: int) -> Tensor:
    """Append `padding` zero tokens; dt = 0 there leaves the state untouched."""
    return t if padding == 0 else F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
