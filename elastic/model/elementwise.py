"""What stands between the matrix products: in plain PyTorch, or one Triton kernel each.

Both compute the same, in at least fp32 inside; gates are fp32 whatever the stream is. Shapes: S sequence, B batch, D
hidden, F ffn, I = heads x channels, K taps, L length; lower case = this rank's shard.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class TorchElementwise:
    """Plain PyTorch: runs anywhere, any dtype."""

    def norm(
        self,
        x: Tensor,
        weight: Tensor,
        active: Tensor | float | None,
        epsilon: float,
        groups: int = 1,
        z: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return weight * u / sqrt(sum_group(u^2) / active + epsilon), u = x silu(z) gate, of `x` and `z` [S, B, I].

        `active`, of one of the equal groups, is the sum of its gates: given for an `x` that is gated already, None with
        a `gate`. `weight` and `gate` are [I].
        """
        u = x if z is None else (x * F.silu(z)).contiguous()
        if gate is not None:
            u, active = u * gate.to(u.dtype), gate.view(groups, -1).sum(-1, keepdim=True)
        assert active is not None
        wide = u.unflatten(-1, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))
        square_sum = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
        return (wide * torch.rsqrt(square_sum / active + epsilon)).to(x.dtype).flatten(-2) * weight

    def squared_relu(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Return relu(x)^2 gate of `x` [S, B, F] and gate [F]; None is all ones."""
        y = F.relu(x).square()
        return y if gate is None else y * gate.to(y.dtype)

    def residual(self, x: Tensor, y: Tensor, depth: Tensor | None, hidden: Tensor | None) -> Tensor:
        """Return x + depth hidden y of `x` and `y` [S, B, D], one number and a gate [D]; None is all ones."""
        scale = hidden if depth is None else depth if hidden is None else depth * hidden
        return x + y if scale is None else torch.addcmul(x, y, scale.to(y.dtype))

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        before: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return silu(bias + sum_j weight[:, j] x[:, t - (K-1-j)]) of `x` [B, L, I], weight [I, K] and bias [I].

        `before` [B, K-1, I] are the inputs in front of `x` (None: zeros). It is moved on in place to the last of both,
        for inference: nothing is then differentiated. `positions` int32 [B, L] is each token's place in its document,
        over whose start no tap reaches (None: one document).
        """
        length, taps = x.shape[1], weight.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0)) if before is None else torch.cat([before, x], dim=1)
        if before is not None:
            before.copy_(padded[:, length:])
        # k shifted multiply-adds are faster on a CPU than conv1d.
        y = bias
        for tap in range(taps):
            reached, shift = padded[:, tap : tap + length], taps - 1 - tap
            if positions is not None and shift:
                reached = reached.masked_fill((positions < shift).unsqueeze(-1), 0.0)
            y = torch.addcmul(y, reached, weight[:, tap])
        return F.silu(y)


class TritonElementwise(TorchElementwise):
    """One kernel of `elastic/kernels` each, in one reading; what they do not compute, fp64, is left to PyTorch."""

    def __init__(self) -> None:
        from elastic.kernels import causal_conv, gated, gated_norm  # Triton is there on GPUs and in tests alone

        self._norm, self._gated, self._conv = gated_norm.gated_norm, gated, causal_conv.causal_conv
        self._most_taps = causal_conv.MOST_TAPS

    def norm(self, x: Tensor, weight: Tensor, active: Tensor | float | None, epsilon: float, *rest: Any) -> Tensor:
        """Normalise; keeps its inputs alone."""
        of = super().norm if x.dtype == torch.float64 else self._norm
        return of(x, weight, active, epsilon, *rest)

    def squared_relu(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Square and gate."""
        of = super().squared_relu if x.dtype == torch.float64 else self._gated.squared_relu
        return of(x, gate)

    def residual(self, x: Tensor, y: Tensor, depth: Tensor | None, hidden: Tensor | None) -> Tensor:
        """Gate and add."""
        of = super().residual if x.dtype == torch.float64 else self._gated.residual
        return of(x, y, depth, hidden)

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        before: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Convolve rows of wider rows where they lie; more taps than the kernel has registers for go to PyTorch."""
        if x.dtype == torch.float64 or weight.shape[1] > self._most_taps:
            return super().causal_conv(x, weight, bias, before, positions)
        y = self._conv(x, weight, bias, positions, before)
        if before is not None:
            before.copy_(torch.cat([before, x], dim=1)[:, x.shape[1] :])
        return y
