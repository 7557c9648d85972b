"""Tensor-parallel linears that compute only the nested part of their weight.

In training with one copy of what is kept, if it is cut at all beyond the stream; gradients are added straight to the
kept places of the buffer that Megatron-Core's data-parallel wrapper gave the weight, so a small cut costs little.

For a few tokens without a copy of what is kept: a product then reads every weight once, so gathering the kept rows
first would cost more than the product itself. The kept part is a few strided grids instead, and each is one batched
product on a view.

Shapes: S sequence, B batch; T tokens, R rows and C columns of this rank's weight, r and c of them kept, b matrices of m
rows in a batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, Work, all_gather_into_tensor, all_reduce, reduce_scatter_tensor

from elastic.kernels.products import add_product, product
from elastic.model.quantised import QuantisedWeight
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut, Grid, add_kept, put_kept, take

# Up to here an inference product leaves the weight where it lies; beyond, one copy of the kept part pays off.
FEW_TOKENS = 8


def _is_short_inference(x: Tensor) -> bool:
    """Tell whether `x` [S, B, ...] holds few tokens and nothing is differentiated: a step of decoding."""
    return x.shape[0] * x.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()


class _NestedWeight:
    """A weight of which a layer uses a part: `hidden_dim` is the stream, `inner` says what its other dimension is."""

    hidden_dim: int
    weight: Tensor
    tp_group: ProcessGroup
    quantised: QuantisedWeight | None = None

    def __init__(self, *args: Any, inner: DimKind, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inner = inner

    def quantise(self, name: str, scales: Tensor | None = None) -> None:
        """Put FP8 codes in the place of the frozen weight, which takes a whole cut from then on."""
        self.quantised = QuantisedWeight.of(name, self.weight, self.tp_group if self.hidden_dim == 0 else None, scales)
        self.weight = None  # type: ignore[assignment]

    def part(self, cut: Cut) -> "_Part":
        """Say which part of this rank's weight a cut computes with."""
        return _Part(self.hidden_dim, cut.grid(DimKind.HIDDEN), cut.grid(self.inner))


class ElasticColumnParallelLinear(_NestedWeight, tensor_parallel.ColumnParallelLinear):
    """Y = X W^T from the stream, rows of W sharded."""

    hidden_dim = 1

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S(/tp), B, kept columns] to [S, B, kept rows of this rank]."""
        part, exchange = self.part(cut), _Exchange(self.tp_group, self.sequence_parallel, self.allreduce_dgrad)
        if self.quantised is not None:
            gathered, gathering = exchange.start_gather(x)
            _finish(gathering)
            return self.quantised.product(part.whole(gathered))
        if _is_short_inference(x) and not self.sequence_parallel:
            y = product_with_rows(x.flatten(0, 1), part.of_stream(self.weight), part.inner)
            return y.unflatten(0, x.shape[:2])
        return _NestedProduct.apply(x, self.weight, part, exchange)


class ElasticRowParallelLinear(_NestedWeight, tensor_parallel.RowParallelLinear):
    """Y = X W^T to the stream, columns of W sharded; the sum over ranks is part of it."""

    hidden_dim = 0

    def forward_cut(self, x: Tensor, cut: Cut) -> Tensor:
        """Map [S, B, kept columns of this rank] to [S(/tp), B, kept rows]."""
        part = self.part(cut)
        if self.quantised is not None:
            return self.summed(self.quantised.product(part.whole(x)))
        if _is_short_inference(x):
            y = product_with_columns(x.flatten(0, 1), part.of_stream(self.weight), part.inner)
            partial = y.unflatten(0, x.shape[:2])
        else:
            partial = _NestedProduct.apply(x, self.weight, part, _Exchange(self.tp_group))
        return self.summed(partial)

    def summed(self, partial: Tensor) -> Tensor:
        """Sum what the columns of all ranks give [S, B, R], to [S(/tp), B, R]."""
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)


@dataclass(frozen=True)
class _Part:
    """The kept part of a weight [R, C]: a prefix of the stream along `hidden_dim`, a nested grid along the other."""

    hidden_dim: int
    hidden: Grid
    inner: Grid

    def whole(self, x: Tensor) -> Tensor:
        """Return the input of a frozen weight, of which no part is taken."""
        assert self.hidden.is_whole and self.inner.is_whole, "a quantised model runs whole"
        return x

    def of_stream(self, weight: Tensor) -> Tensor:
        """Cut to the stream's width alone: a view."""
        return take(weight, self.hidden_dim, self.hidden)

    def of(self, weight: Tensor) -> Tensor:
        """Return [r, c], a copy only where the inner dimension is cut."""
        return take(self.of_stream(weight), 1 - self.hidden_dim, self.inner)

    def put(self, full: Tensor, part: Tensor) -> None:
        """Write [r, c] into its places in [R, C]."""
        put_kept(self.of_stream(full), 1 - self.hidden_dim, self.inner, part)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the product of [r, T] and [T, c] to its places in `total` [R, C], summed in the precision of `total`."""
        place = self.of_stream(total)
        if not self.inner.is_prefix:
            add_kept(place, 1 - self.hidden_dim, self.inner, product(left, right, total.dtype))
            return
        place = take(place, 1 - self.hidden_dim, self.inner)
        add_product(place, left, right)


@dataclass(frozen=True)
class _Exchange:
    """What a product from the stream exchanges with the ranks that hold its other rows, as in Megatron-Core.

    `sequence`: each rank has its tokens of X, and wants the gradient of these. `sum_gradient`: all have the same X.
    """

    group: ProcessGroup
    sequence: bool = False
    sum_gradient: bool = False

    def start_gather(self, x: Tensor) -> tuple[Tensor, Work | None]:
        """Return X of all tokens, once the work is done."""
        if not self.sequence:
            return x, None
        size = [x.shape[0] * self.group.size(), *x.shape[1:]]
        gathered = get_global_memory_buffer().get_tensor(size, x.dtype, "mpu")
        return gathered, all_gather_into_tensor(gathered, x.contiguous(), group=self.group, async_op=True)

    def start_reduce(self, grad_x: Tensor) -> tuple[Tensor, Work | None]:
        """Return the gradient of X summed over ranks, once the work is done."""
        if self.sequence:
            own = grad_x.new_empty(grad_x.shape[0] // self.group.size(), *grad_x.shape[1:])
            return own, reduce_scatter_tensor(own, grad_x, group=self.group, async_op=True)
        return grad_x, all_reduce(grad_x, group=self.group, async_op=True) if self.sum_gradient else None


class _NestedProduct(torch.autograd.Function):
    """Y = X W^T with the kept part of W: Megatron-Core's product and exchanges, hidden behind products.

    Where Megatron-Core's wrapper gave W a buffer for its gradient, the product is added to the kept places there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, part: _Part, exchange: _Exchange) -> Tensor:
        kept = part.of(weight)
        ctx.save_for_backward(x if weight.requires_grad else None, kept)
        ctx.weight, ctx.part, ctx.exchange = weight, part, exchange
        gathered, gathering = exchange.start_gather(x)
        _finish(gathering)
        return (gathered.flatten(0, 1) @ kept.t()).unflatten(0, gathered.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, kept = ctx.saved_tensors
        tokens, grad_weight = grad_y.flatten(0, 1), None
        if x is not None:
            x, gathering = ctx.exchange.start_gather(x)
        grad_x = (tokens @ kept).unflatten(0, grad_y.shape[:2])
        if x is not None:
            _finish(gathering)
        grad_x, reducing = ctx.exchange.start_reduce(grad_x)
        if x is not None:
            grad_weight = _weight_gradient(ctx.weight, ctx.part, tokens.t(), x.flatten(0, 1))
        _finish(reducing)
        return grad_x, grad_weight, None, None


def _weight_gradient(weight: Tensor, part: _Part, left: Tensor, right: Tensor) -> Tensor:
    """Return what autograd gets for the product of [r, T] and [T, c], the gradient of the kept part of `weight`."""
    if hasattr(weight, "main_grad"):
        part.add_product(weight.main_grad, left, right)
        return _added(weight)
    product = left @ right
    if product.shape == weight.shape:
        return product
    full = torch.zeros_like(weight)
    part.put(full, product)
    return full


def add_to_buffer(weight: Tensor, gradient: Tensor, scale: Tensor) -> Tensor | None:
    """Add gradient x scale to the wrapper's buffer and return what autograd gets; None where there is no buffer."""
    if not hasattr(weight, "main_grad"):
        return None
    weight.main_grad.addcmul_(gradient, scale)
    return _added(weight)


def _added(weight: Tensor) -> Tensor:
    """Have the wrapper's hook leave alone what it finds in `grad`; it wants to find something."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def _finish(work: Work | None) -> None:
    if work is not None:
        work.wait()


@dataclass(frozen=True)
class _Strip:
    """One block's kept rows as a view [b, m, C], m in runs of `full` rows of which the first `kept` count.

    A batch has one stride, so of two directions that are both cut (heads of a group, channels of a head) the inner one
    is computed whole: one product that does a little more is faster than many small ones.
    """

    view: Tensor
    full: int = 1
    kept: int = 1


def product_with_rows(x: Tensor, weight: Tensor, rows: Grid) -> Tensor:
    """Map x [T, C] to [T, r] with the kept rows of `weight` [R, C]."""
    if rows.is_whole:
        return x @ weight.t()
    parts = []
    for strip in _strips(weight, rows):
        y = torch.bmm(x.expand(len(strip.view), -1, -1), strip.view.mT)  # [b, T, m]
        runs = y.transpose(0, 1).unflatten(2, (-1, strip.full))[..., : strip.kept]
        parts.append(runs.reshape(x.shape[0], rows.outer, -1))
    return torch.cat(parts, dim=2).flatten(1)


def product_with_columns(x: Tensor, weight: Tensor, columns: Grid) -> Tensor:
    """Map x [T, c] to [T, R] with the kept columns of `weight` [R, C]."""
    if columns.is_whole:
        return x @ weight.t()
    sizes = [math.prod(block.kept) for block in columns.blocks]
    by_block = x.unflatten(1, (columns.outer, -1)).split(sizes, dim=2)
    total = x.new_zeros(x.shape[0], weight.shape[0])
    for strip, own in zip(_strips(weight.t(), columns), by_block, strict=True):
        runs = own.reshape(x.shape[0], len(strip.view), -1, strip.kept)
        rows = F.pad(runs, (0, strip.full - strip.kept)).flatten(2).transpose(0, 1)  # [b, T, m]
        total += torch.bmm(rows, strip.view).sum(dim=0)
    return total


def _strips(weight: Tensor, layout: Grid) -> Iterator[_Strip]:
    """Yield the kept part of dimension 0 of `weight`, block by block."""
    sizes = [math.prod(block.full) for block in layout.blocks]
    for block, part in zip(layout.blocks, weight.unflatten(0, (layout.outer, -1)).split(sizes, dim=1), strict=True):
        # Directions as (full, kept); one that is whole lies side by side with the one around it.
        directions: list[tuple[int, int]] = []
        for full, kept in zip(block.full, block.kept, strict=True):
            if directions and full == kept:
                around = directions.pop()
                full, kept = around[0] * full, around[1] * kept
            directions.append((full, kept))
        if layout.outer > 1 or len(directions) == 1 or directions[0][0] != directions[0][1]:
            directions.insert(0, (layout.outer, layout.outer))
        assert len(directions) <= 3, "nobody lays out a grid that is cut in three directions"
        (batch, _), (full, kept), *inner = directions
        run = inner[0] if inner else (1, 1)
        yield _Strip(part.view(batch, full * run[0], -1)[:, : kept * run[0]], *run)
