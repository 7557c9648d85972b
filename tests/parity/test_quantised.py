"""An FP8 teacher: its products against an independent reading of E4M3 in fp64, and what it leaves of a model."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic.model.model import Layout
from elastic.model.quantised import QuantisationError, QuantisedWeight
from elastic.space.gates import Gates
from tests.parity.model_factory import SPACES, build_lively, logits_of, one_process, relative_error, tokens_for

PROJECTIONS = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def e4m3(values: Tensor) -> Tensor:
    """Round to 3 bits behind the leading one from 2^-6 up and to multiples of 2^-9 below, halves to even."""
    step = torch.exp2((torch.frexp(values.abs()).exponent - 1).clamp(min=-6).double() - 3)
    return (values / step).round() * step


def of_rows(rows: Tensor) -> Tensor:
    """Return the numbers that quantised rows stand for, fp64; scales are fp32."""
    scales = (rows.abs().amax(1, keepdim=True).float() / 448).double()
    scales[scales == 0] = 1
    return e4m3((rows.double() / scales).float().double()) * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_are_those_of_the_rounded_numbers(dtype: torch.dtype) -> None:
    """Odd sizes, rows of zeros, of tiny and of huge numbers, and spread over many powers of two."""
    generator = torch.Generator().manual_seed(1)
    weight, x = (torch.randn(*size, generator=generator) for size in ((37, 53), (5, 3, 53)))
    weight, x = (t * torch.exp2(-12 * torch.rand(t.shape, generator=generator)) for t in (weight, x))
    weight[3], x[1, 1], weight[4], x[2] = 0, 0, weight[4] * 1e20, x[2] * 1e-20
    weight, x = weight.to(dtype), x.to(dtype)
    found = QuantisedWeight.of("weight", weight, None).product(x)
    expected = of_rows(x.flatten(0, 1)) @ of_rows(weight).t()
    assert found.dtype is dtype and found.shape == (5, 3, 37)
    # Per value: a sum of 53 products in fp32, then one rounding to the result's type.
    sums = of_rows(x.flatten(0, 1)).abs() @ of_rows(weight).abs().t()
    bound = 60 * 2**-24 * sums + torch.finfo(dtype).eps * expected.abs()
    assert ((found.flatten(0, 1).double() - expected).abs() <= bound).all()
    plain = x.flatten(0, 1).double() @ weight.double().t()
    assert 0.005 < relative_error(found.flatten(0, 1)[:, 5:][:6].double(), plain[:, 5:][:6]) < 0.1


def test_an_export_whose_sizes_a_gpu_does_not_multiply_is_imitated_there() -> None:
    """On a device of sizes alone: a teacher of such sizes is refused, an export is for other machines."""
    with FakeTensorMode():
        x, even, odd = (torch.empty(size, device="cuda") for size in ((5, 3, 160), (768, 160), (748, 160)))
        with pytest.raises(QuantisationError, match="in_proj has 748 x 160 weights on a rank"):
            QuantisedWeight.of("in_proj", odd, None)
        served = [QuantisedWeight.of("in_proj", one, None, torch.ones(len(one), 1)) for one in (even, odd)]
        assert [one.multiplied for one in served] == [True, False]
        assert served[1].product(x).shape == (5, 3, 748)


def test_a_quantised_model_keeps_a_byte_for_each_weight_of_its_projections() -> None:
    space = SPACES["two groups, depth 7"]
    model, tokens = build_lively(space, Layout()), tokens_for(space.parent)
    names = {name for name, _ in model.named_parameters()}
    model.requires_grad_(False)
    exact = logits_of(model, tokens, None)
    model.quantise()
    gone = names - {name for name, _ in model.named_parameters()}
    assert gone == {name for name in names if name.split(".")[-2] in PROJECTIONS} and len(gone) == 14
    kept = [module.quantised for module in model.modules() if getattr(module, "quantised", None) is not None]
    assert len(kept) == 14 and all(weight.codes.values.element_size() == 1 for weight in kept)
    # Of random weights, which amplify what seven layers round; unrelated logits would be at 1.4.
    assert 0.001 < relative_error(logits_of(model, tokens, None), exact) < 0.5
    with pytest.raises(AssertionError, match="runs whole"):
        logits_of(model, tokens, Gates.slice(space.subnet({axis: (1,) * space.num_slots(axis) for axis in space.axes})))
