"""Products in fp32 of half-precision factors, added to rows of wider rows, with a torch that adds so and without."""

import pytest
import torch

from elastic.kernels import products
from tests.unit.kernels.precision import DEVICE

# fp32 adds up in some order; a CPU rounds to bf16 before it adds, some processors on the way, too.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-4 if DEVICE.type == "cuda" else 2**-5, torch.float64: 1e-12}


@pytest.mark.parametrize("adds", [True, False] if DEVICE.type == "cuda" else [True])  # a CPU does not ask
@pytest.mark.parametrize("dtype", BOUND)
def test_a_product_is_added_where_it_belongs(dtype: torch.dtype, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not adds:
        monkeypatch.setattr(products, "ADDS_TO_WIDER_SUMS", False)
    generator = torch.Generator().manual_seed(1)
    grad_y, x = (torch.randn(65, size, generator=generator).to(DEVICE, dtype) for size in (24, 40))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.randn(30, 48, generator=generator).to(DEVICE, wide)
    before, exact = total.clone(), grad_y.double().t() @ x.double()
    products.add_product(total[:24, :40], grad_y.t(), x)
    largest = float(exact.abs().max())
    assert float((total[:24, :40].double() - before[:24, :40] - exact).abs().max()) <= BOUND[dtype] * largest
    assert torch.equal(total[24:], before[24:]) and torch.equal(total[:, 40:], before[:, 40:])
    found = products.product(grad_y.t(), x, wide)
    assert found.dtype == wide and float((found - exact).abs().max()) <= BOUND[dtype] * largest
