"""Products of half-precision matrices in fp32, and added to sums in fp32, without a rounding in between on CUDA."""

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# With a sum in fp32 beside factors in half precision (pytorch#167931); builds on the way to 2.10 may have it or not.
ADDS_TO_WIDER_SUMS = TorchVersion(torch.__version__) >= "2.10"


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left right of [r, T] and [T, c] in `dtype`; a CPU, other than CUDA, rounds to the factors' dtype first."""
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left right to `total` [r, c] in place, any rows of wider ones; on CUDA without the product in between."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.is_cuda and ADDS_TO_WIDER_SUMS:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(product(left, right, total.dtype))
