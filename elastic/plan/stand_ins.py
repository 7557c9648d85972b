"""Stand-ins for the GPU's kernels in a dry run: the same tensors kept, exchanged and allocated, nothing computed.

They are what the model's code calls instead of mamba-ssm, Transformer Engine and elastic/kernels on tensors without
memory; formulas and sources are those of `memory`. Each tells a counter what its kernels read and write.
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
from elastic.plan.live import MovedBytes
from elastic.plan.work import FUSED_LAUNCHES, KernelSet

FUSED_CHUNK_TOKENS = KernelSet.FUSED.chunk_tokens


class StandInStateSpace(TorchStateSpace):
    """What mamba-ssm's scan leaves behind in training: nothing is decoded here."""

    def __init__(self, moved: MovedBytes) -> None:
        self.moved = moved

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
        """Keep out, x, dt, dA_cumsum, dt_bias, a, b, c, d."""
        return _Scan.apply(self.moved, x, dt, dt_bias.float(), a.float(), b, c, d.float())


class StandInAttention(MegatronModule):
    """What Transformer Engine's causal attention leaves behind, its ring over the context ranks included."""

    moved: MovedBytes

    def __init__(self, config: TransformerConfig, *_args: Any, pg_collection: Any = None, **_kwargs: Any) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Map q [S, B, h, A], k and v [S, B, kv, A] to [S, B, h*A]."""
        return _Attention.apply(self.moved, query, key, value, self.cp_group).flatten(2)


class StandInElementwise(TorchElementwise):
    """What the kernels of elastic/kernels leave behind: their inputs, and gradients of the same sizes."""

    def __init__(self, moved: MovedBytes) -> None:
        self.moved = moved

    def norm(self, x: Tensor, weight: Tensor, active: Tensor | float | None, epsilon: float, *rest: Any) -> Tensor:
        """Keep x, z and what is as small as the weight."""
        others = (t for t in (weight, active, *rest) if isinstance(t, Tensor))
        return _Elementwise.apply(self.moved, x, None, *others)

    def squared_relu(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Keep x and the gate."""
        return _Elementwise.apply(self.moved, x, None, *(() if gate is None else (gate,)))

    def residual(self, x: Tensor, y: Tensor, depth: Tensor | None, hidden: Tensor | None) -> Tensor:
        """Keep y and the gates, or nothing."""
        gates = [t for t in (depth, hidden) if t is not None]
        return _Elementwise.apply(self.moved, y, x, *gates) if gates else x + y

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
        """Keep the input [B, L, I], a view of wider rows."""
        return _Elementwise.apply(self.moved, x, None, weight, bias)


def stand_ins(moved: MovedBytes) -> Kernels:
    """Return all of them, on one counter."""

    class Attention(StandInAttention):
        pass

    Attention.moved = moved
    return Kernels(StandInStateSpace(moved), Attention, StandInElementwise(moved))


class _Elementwise(torch.autograd.Function):
    """Keeps `kept` and what is as small as a weight, or another input of its own size; `passed`, a stream that is only
    added to, has the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, moved: MovedBytes, kept: Tensor, passed: Tensor | None, *others: Tensor) -> Tensor:
        ctx.save_for_backward(kept, *others)
        ctx.moved, ctx.passes, out = moved, passed is not None, kept.new_empty(kept.shape)
        moved.add(kept, *others, out, *(() if passed is None else (passed,)))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, *others = ctx.saved_tensors
        passed, found = gradients[0] if ctx.passes else None, [t.new_empty(t.shape) for t in (kept, *others)]
        launches = 3 if others else 1  # what is summed over rows is left in parts, added up and rounded
        ctx.moved.add(kept, *others, gradients[0], *found, launches=launches)
        return None, found[0], passed, *found[1:]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, moved: MovedBytes, x: Tensor, dt: Tensor, dt_bias: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
    ) -> Tensor:
        out, decay = x.new_empty(x.shape), a.new_empty(_padded(dt), dt.shape[2])
        ctx.save_for_backward(out, x, dt, decay, dt_bias, a, b, c, d)
        ctx.moved = moved
        moved.add(x, dt, b, c, out, launches=FUSED_LAUNCHES["scan"][0])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        out, x, dt, _, dt_bias, a, b, c, d = ctx.saved_tensors
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
        kept_and_found = (out, x, dt, b, c, gradients[0], dx, ddt, db, dc)
        ctx.moved.add(*kept_and_found, launches=FUSED_LAUNCHES["scan"][1])
        return None, dx, ddt, torch.empty_like(dt_bias), torch.empty_like(a), db, dc, torch.empty_like(d)


def _padded(dt: Tensor) -> int:
    batch, length = dt.shape[:2]
    return batch * -(-length // FUSED_CHUNK_TOKENS) * FUSED_CHUNK_TOKENS


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, moved: MovedBytes, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        q, k, v = (t.contiguous() for t in (query, key, value))
        out = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        ctx.moved, ctx.group = moved, group
        moved.add(q, k, v, out, launches=FUSED_LAUNCHES["attention"][0] * group.size())
        _pass_round((k, v), group, group.size() - 1)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, _ = ctx.saved_tensors
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        ranks = ctx.group.size()
        ctx.moved.add(q, k, v, out, gradients[0], dq, dk, dv, launches=FUSED_LAUNCHES["attention"][1] * ranks)
        _pass_round((k, v), ctx.group, ranks - 1)
        _pass_round((dk, dv), ctx.group, ranks if ranks > 1 else 0)
        return None, dq, dk, dv, None


def _pass_round(tensors: tuple[Tensor, Tensor], group: dist.ProcessGroup, times: int) -> None:
    """Send k and v (or their gradients) to the next rank of the ring."""
    for _ in range(times):
        for tensor in tensors:
            dist.send(tensor, group=group, group_dst=(group.rank() + 1) % group.size())
