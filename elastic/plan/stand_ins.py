"""Stand-ins for the GPU's kernels in a dry run: the same tensors kept, exchanged and allocated, nothing computed.

They are what the model's code calls instead of mamba-ssm, Transformer Engine and elastic/kernels on tensors without
memory; formulas and sources are those of `memory`.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from elastic.model.backends import Kernels
from elastic.model.elementwise import TorchElementwise
from elastic.model.state_space import TorchStateSpace
from elastic.plan.work import KernelSet

FUSED_CHUNK_TOKENS = KernelSet.FUSED.chunk_tokens


class StandInStateSpace(TorchStateSpace):
    """What mamba-ssm's scan leaves behind in training: nothing is decoded here."""

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
    ) -> Tensor:
        """Keep out, x, dt, dA_cumsum, dt_bias, a, b, c, d."""
        return _Scan.apply(x, dt, dt_bias.float(), a.float(), b, c, d.float())


class StandInAttention(MegatronModule):
    """What Transformer Engine's causal attention leaves behind, its ring over the context ranks included."""

    def __init__(self, config: TransformerConfig, *_args: Any, pg_collection: Any = None, **_kwargs: Any) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Map q [S, B, h, A], k and v [S, B, kv, A] to [S, B, h*A]."""
        return _Attention.apply(query, key, value, self.cp_group).flatten(2)


class StandInElementwise(TorchElementwise):
    """What the kernels of elastic/kernels leave behind: their inputs, and gradients of the same sizes."""

    def norm(self, x: Tensor, weight: Tensor, active: Tensor | float | None, epsilon: float, *rest: Any) -> Tensor:
        """Keep x, z and what is as small as the weight."""
        return _Elementwise.apply(x, None, *(t for t in (weight, active, *rest) if isinstance(t, Tensor)))

    def squared_relu(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Keep x and the gate."""
        return _Elementwise.apply(x, None, *(() if gate is None else (gate,)))

    def residual(self, x: Tensor, y: Tensor, depth: Tensor | None, hidden: Tensor | None) -> Tensor:
        """Keep y and the gates, or nothing."""
        gates = [t for t in (depth, hidden) if t is not None]
        return _Elementwise.apply(y, x, *gates) if gates else x + y

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
        """Keep the input [B, L, I], a view of wider rows."""
        return _Elementwise.apply(x, None, weight, bias)


STAND_INS = Kernels(StandInStateSpace(), StandInAttention, StandInElementwise())


class _Elementwise(torch.autograd.Function):
    """Keeps `kept` and the small tensors; `passed`, a stream that is only added to, has the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, passed: Tensor | None, *small: Tensor) -> Tensor:
        ctx.save_for_backward(kept, *small)
        ctx.passes = passed is not None
        return kept.new_empty(kept.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, *small = ctx.saved_tensors
        passed = gradients[0] if ctx.passes else None
        return kept.new_empty(kept.shape), passed, *(t.new_empty(t.shape) for t in small)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, dt_bias: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        out, decay = x.new_empty(x.shape), a.new_empty(_padded(dt), dt.shape[2])
        ctx.save_for_backward(out, x, dt, decay, dt_bias, a, b, c, d)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        _, x, dt, _, dt_bias, a, b, c, d = ctx.saved_tensors
        tokens, (heads, channels), (groups, state) = _padded(dt), x.shape[2:], b.shape[2:]
        chunks = tokens // FUSED_CHUNK_TOKENS
        workspace = [
            a.new_empty(2, chunks, heads, channels, state),
            x.new_empty(2, chunks, heads, channels, state),
            a.new_empty(chunks, groups, FUSED_CHUNK_TOKENS, FUSED_CHUNK_TOKENS),
        ]
        sums = [a.new_empty(tokens, groups, state) for _ in (b, c)]
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        del workspace
        db, dc = (total.new_empty(t.shape, dtype=t.dtype) for total, t in zip(sums, (b, c), strict=True))
        return dx, ddt, torch.empty_like(dt_bias), torch.empty_like(a), db, dc, torch.empty_like(d)


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
