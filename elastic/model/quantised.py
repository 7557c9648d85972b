"""Weights in FP8 (E4M3), of a frozen model or an export: a scale per output row, activations with one per token.

A scale is the row's largest magnitude over E4M3's, of the whole row or token whatever ranks hold of it: the codes are
the same at every layout. GPUs multiply codes (torch._scaled_mm), CPUs the numbers they stand for, summing in fp32.

Shapes: T tokens, R rows and C columns of this rank's weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from elastic.space.layers import FP8_MULTIPLE

E4M3 = torch.float8_e4m3fn
LIMIT = torch.finfo(E4M3).max


class QuantisationError(ValueError):
    """A weight that FP8 kernels do not take, a GPU without them, or a model that is not whole."""


def multiplies_fp8() -> bool:
    """Tell whether this machine has FP8 products: its GPU's (Ada, Hopper and later), or a CPU's imitation."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


@dataclass(frozen=True)
class Codes:
    """Rows of E4M3 numbers [n, C] and their scales, fp32 [n, 1]."""

    values: Tensor
    scales: Tensor

    def numbers(self) -> Tensor:
        """Return what the codes stand for [n, C], fp32."""
        return self.values.float() * self.scales


def row_scales(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return the scale of each of rows [n, C], fp32 [n, 1]; `group` holds the other columns of the same rows."""
    most = rows.abs().amax(dim=1, keepdim=True).float()
    if group is not None and group.size() > 1:
        all_reduce(most, op=ReduceOp.MAX, group=group)
    return torch.where(most > 0, most / LIMIT, 1.0)


def quantise(rows: Tensor, scales: Tensor) -> Codes:
    """Round rows [n, C] to E4M3, given their scales [n, 1]."""
    return Codes((rows.float() / scales).clamp(-LIMIT, LIMIT).to(E4M3), scales)


@dataclass(frozen=True)
class QuantisedWeight:
    """A linear's weight [R, C]; `group` holds the other columns of its rows (None: they are all here).

    `multiplied`: by a GPU's FP8 products; if not, products of the numbers that codes stand for imitate them.
    """

    codes: Codes
    group: ProcessGroup | None
    multiplied: bool

    @classmethod
    def of(
        cls, name: str, weight: Tensor, group: ProcessGroup | None, scales: Tensor | None = None
    ) -> "QuantisedWeight":
        """Quantise a weight, its scales given or its own.

        Raises QuantisationError for a teacher's (its own scales) where a GPU cannot multiply it; those that are given
        are an export's, which other machines serve.
        """
        odd, taken = any(size % FP8_MULTIPLE for size in weight.shape), multiplies_fp8()
        if weight.is_cuda and scales is None:
            if not taken:
                raise QuantisationError("distill.teacher_precision = fp8: this GPU multiplies no FP8; set bf16")
            if odd:
                sizes = f"{weight.shape[0]} x {weight.shape[1]}"
                rule = f"{name} has {sizes} weights on a rank, no multiples of {FP8_MULTIPLE}"
                raise QuantisationError(f"distill.teacher_precision = fp8: {rule}; set bf16, or lower parallel.tensor")
        rows = weight.detach()
        codes = quantise(rows, row_scales(rows, group) if scales is None else scales.to(rows.device))
        return cls(codes, group, weight.is_cuda and taken and not odd)

    def product(self, x: Tensor) -> Tensor:
        """Map [S, B, C] to [S, B, R] in its dtype: what these columns give."""
        rows = x.flatten(0, 1)
        tokens = quantise(rows, row_scales(rows, self.group))
        if self.multiplied:
            y = torch._scaled_mm(
                tokens.values,
                self.codes.values.t(),
                scale_a=tokens.scales,
                scale_b=self.codes.scales.t(),
                out_dtype=torch.bfloat16,
            ).to(x.dtype)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            summed = tokens.values.to(wide) @ self.codes.values.to(wide).t()
            y = (summed * tokens.scales * self.codes.scales.t()).to(x.dtype)
        return y.unflatten(0, x.shape[:2])
