"""A product to the stream whose gates multiply its weight, so that neither its input nor its result is gated, or kept.

Y = X (diag(r) W diag(c))^T, as if c had gated X and r Y. With G = dY^T X: dW = r G c elementwise, dr = (G W) c and
dc = (G W)^T r, G W elementwise.

Shapes: S sequence, B batch, D hidden, I columns of this rank's weight.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic.kernels.products import product
from elastic.model.linear import ElasticRowParallelLinear, add_to_buffer


def gated_linear(linear: ElasticRowParallelLinear, x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Map [S, B, I] to [S(/tp), B, D], the result times `rows` [D] of `x` times `columns` [I]; None is all ones."""
    if rows is not None and not linear.sequence_parallel:
        # Each rank sees what its own columns say; the gates of the stream count once, with all of it on every rank.
        rows = copy_to_tensor_model_parallel_region(rows, group=linear.tp_group)
    return linear.summed(_GatedProduct.apply(x, linear.weight, rows, columns))


class _GatedProduct(torch.autograd.Function):
    """The partial result of this rank's columns; the gated weight is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, rows, columns)
        ctx.weight = weight
        return (x.flatten(0, 1) @ _gated(weight, _scale(rows, columns), weight).t()).unflatten(0, x.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, columns = ctx.saved_tensors
        weight, tokens, scale = ctx.weight, grad_y.flatten(0, 1), _scale(rows, columns)
        grad_x = (tokens @ _gated(weight, scale, weight)).unflatten(0, x.shape[:2])
        wide = torch.promote_types(scale.dtype, x.dtype)
        of_product = product(tokens.t(), x.flatten(0, 1), wide)
        grad_weight = None
        if weight.requires_grad:
            grad_weight = add_to_buffer(weight, of_product, scale)
            grad_weight = _gated(of_product, scale, weight) if grad_weight is None else grad_weight
        of_product = of_product * weight
        grad_rows = grad_columns = None
        if rows is not None:
            grad_rows = of_product.sum(1) if columns is None else of_product @ columns.to(wide)
        if columns is not None:
            grad_columns = of_product.sum(0) if rows is None else of_product.t() @ rows.to(wide)
        return grad_x, grad_weight, grad_rows, grad_columns


def _scale(rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return the factors of a weight in the gates' precision: [D, I], or one row or column of them."""
    if rows is None:
        assert columns is not None, "without gates it is a plain product"
        return columns.unsqueeze(0)
    return rows.unsqueeze(1) if columns is None else torch.outer(rows, columns)


def _gated(weight: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Multiply in the gates' precision, for a result like another tensor."""
    return torch.mul(weight, scale, out=torch.empty_like(like))
