"""How a kernel is held to fp64: by what plain PyTorch loses in fp32, or by one rounding of a bf16 result."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU in Triton's interpreter
Function = Callable[..., Tensor]


def drawn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a tensor by its shape."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def results(function: Function, inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the output of `function(**inputs)` and the gradients of its tensors, cast to `dtype` if given."""
    leaves = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # A view stays one: rows of wider rows are what the model passes.
            wide = (
                value.detach().clone(memory_format=torch.preserve_format) if value.is_contiguous() else value.detach()
            )
            leaves[name] = (wide if dtype is None else wide.to(dtype)).requires_grad_()
    out = function(**{**inputs, **leaves})
    weight = torch.linspace(-1.0, 1.0, out.numel(), device=out.device).sin().view(out.shape)
    grads = torch.autograd.grad(out, list(leaves.values()), weight.bfloat16().to(out.dtype), allow_unused=True)
    return {"out": out.detach()} | {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def worst(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def assert_as_exact(kernel: Function, twin: Function, inputs: dict[str, Any]) -> None:
    """Hold output and gradients of `kernel` to the twin's in fp64: as close as the twin itself comes in fp32.

    Sums in another order lose as much, a wrong formula far more: at least the square root of the summed terms in last
    digits, since a machine that adds in another order may be lucky. A result in bf16 may be off by one digit: Triton's
    interpreter cuts where a GPU rounds.
    """
    exact = results(twin, inputs, torch.float64)
    plain, found = results(twin, inputs, torch.float32), results(kernel, inputs)
    assert exact.keys() == found.keys()
    values = max(value.numel() for value in inputs.values() if isinstance(value, Tensor))
    for name, expected in exact.items():
        last_digit = 2.0**-7 if found[name].dtype == torch.bfloat16 else 0.0
        summed = max(1.0, values / expected.numel())
        bound = 8 * max(worst(plain[name], expected), 2.0**-23 * summed**0.5) + last_digit
        assert found[name].shape == expected.shape and worst(found[name], expected) <= bound, name
