"""Stand-ins for the GPU's kernels in a dry run: the same tensors kept, exchanged and allocated, nothing computed.

They are what the model's code calls instead of mamba-ssm, causal-conv1d and Transformer Engine on tensors without
memory; formulas and sources are those of `memory`.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from elastic.model.specs import Kernels
from elastic.plan.work import KernelSet

FUSED_CHUNK_TOKENS = KernelSet.FUSED.chunk_tokens


class StandInStateSpace:
    """What mamba-ssm's scan and causal-conv1d leave behind in training: nothing is decoded here."""

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
        """Keep the input [B, L, I], or a copy of it where the kernel wants one."""
        rows = x.transpose(1, 2)
        if any(size % 8 for size in (rows.shape[1], rows.stride(0), rows.stride(2))):
            x = rows.contiguous().transpose(1, 2)
        return _Convolution.apply(x, weight, bias)

    def scan(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """Keep out, x, dt, dA_cumsum, a, b, c, d."""
        return _Scan.apply(x, dt, a.float(), b, c, d.float())


class StandInAttention(MegatronModule):
    """What Transformer Engine's causal attention leaves behind, its ring over the context ranks included."""

    def __init__(self, config: TransformerConfig, *_args: Any, pg_collection: Any = None, **_kwargs: Any) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Map q [S, B, h, A], k and v [S, B, kv, A] to [S, B, h*A]."""
        return _Attention.apply(query, key, value, self.cp_group).flatten(2)


STAND_INS = Kernels(StandInStateSpace(), StandInAttention)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(saved.new_empty(saved.shape) for saved in ctx.saved_tensors)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        out, decay = x.new_empty(x.shape), dt.new_empty(_padded(dt), dt.shape[2])
        ctx.save_for_backward(out, x, dt, decay, a, b, c, d)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        _, x, dt, _, a, b, c, d = ctx.saved_tensors
        tokens, (heads, channels), (groups, state) = _padded(dt), x.shape[2:], b.shape[2:]
        chunks = tokens // FUSED_CHUNK_TOKENS
        workspace = [
            dt.new_empty(2, chunks, heads, channels, state),
            x.new_empty(2, chunks, heads, channels, state),
            dt.new_empty(chunks, groups, FUSED_CHUNK_TOKENS, FUSED_CHUNK_TOKENS),
        ]
        sums = [dt.new_empty(tokens, groups, state) for _ in (b, c)]
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        del workspace
        db, dc = (total.new_empty(t.shape, dtype=t.dtype) for total, t in zip(sums, (b, c), strict=True))
        return dx, ddt, torch.empty_like(a), db, dc, torch.empty_like(d)


def _padded(dt: Tensor) -> int:
    batch, length = dt.shape[:2]
    return batch * -(-length // FUSED_CHUNK_TOKENS) * FUSED_CHUNK_TOKENS


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        q, k, v = (t.contiguous() for t in (query, key, value))
        out = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        ctx.group = group
        _pass_round((k, v), group, group.size() - 1)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        _pass_round((k, v), ctx.group, ctx.group.size() - 1)
        _pass_round((dk, dv), ctx.group, ctx.group.size() if ctx.group.size() > 1 else 0)
        return dq, dk, dv, None


def _pass_round(tensors: tuple[Tensor, Tensor], group: dist.ProcessGroup, times: int) -> None:
    """Send k and v (or their gradients) to the next rank of the ring."""
    for _ in range(times):
        for tensor in tensors:
            dist.send(tensor, group=group, group_dst=(group.rank() + 1) % group.size())
