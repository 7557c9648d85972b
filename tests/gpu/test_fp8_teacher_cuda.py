"""FP8 products of a GPU are those of the CPU's imitation, which tests/parity/test_quantised.py holds to fp64."""

import pytest
import torch

from elastic.model.quantised import QuantisationError, QuantisedWeight, multiplies_fp8
from tests.parity.model_factory import relative_error

pytestmark = pytest.mark.gpu


def test_a_gpu_multiplies_the_same_codes() -> None:
    if not multiplies_fp8():
        pytest.skip("this GPU multiplies no FP8")
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn(*size, generator=generator).bfloat16() for size in ((96, 256), (33, 2, 256)))
    imitated, real = QuantisedWeight.of("weight", weight, None), QuantisedWeight.of("weight", weight.cuda(), None)
    assert torch.equal(real.codes.scales.cpu(), imitated.codes.scales)
    assert torch.equal(real.codes.values.cpu().float(), imitated.codes.values.float())
    # Two roundings of a sum to bf16, and what the tensor cores' own sums lose.
    assert relative_error(real.product(x.cuda()).cpu(), imitated.product(x)) <= 2**-8


def test_sizes_that_the_kernels_refuse_are_named() -> None:
    if not multiplies_fp8():
        pytest.skip("this GPU multiplies no FP8")
    with pytest.raises(QuantisationError, match="in_proj has 100 x 256 weights on a rank"):
        QuantisedWeight.of("mixer.in_proj", torch.zeros(100, 256, device="cuda"), None)
