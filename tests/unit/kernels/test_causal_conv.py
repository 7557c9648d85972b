"""The causal convolution (in Triton's interpreter where there is no GPU) against its definition in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.kernels import causal_conv as kernel
from elastic.kernels.causal_conv import causal_conv
from elastic.model.elementwise import TritonElementwise
from tests.unit.kernels.precision import DEVICE, assert_as_exact, drawn


def twin(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """Sum the taps token by token."""
    taps = weight.shape[1]
    front = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if before is None else before.to(x.dtype)
    padded = torch.cat([front, x], dim=1)
    rows = []
    for t in range(x.shape[1]):
        pre = bias.expand(x.shape[0], -1)
        for tap in range(taps):
            value = padded[:, t + tap]
            if position is not None:
                value = value * (position[:, t] >= taps - 1 - tap)[:, None]
            pre = pre + weight[:, tap] * value
        rows.append(F.silu(pre))
    return torch.stack(rows, dim=1)


def positions(*rows: list[int]) -> Tensor:
    """Return each token's place in its document from the documents' lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows]).to(DEVICE, torch.int32)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1, 1), (2, 7, 5), (1, 33, 130)])
def test_pitfall_06_convolution_of_any_width(taps: int, batch: int, length: int, channels: int) -> None:
    inputs = {"x": drawn(batch, length, channels, scale=2.0), "weight": drawn(channels, taps), "bias": drawn(channels)}
    assert_as_exact(causal_conv, twin, inputs)


def test_rows_of_wider_rows_in_another_order() -> None:
    x = drawn(40, 2, 30)[..., 5:18].transpose(0, 1)  # tokens first, as Megatron-Core keeps them
    assert_as_exact(causal_conv, twin, {"x": x, "weight": drawn(13, 4), "bias": drawn(13)})


@pytest.mark.parametrize("taps", [2, 4])
def test_no_tap_reaches_over_the_start_of_a_document(taps: int) -> None:
    inputs = {"x": drawn(2, 40, 6), "weight": drawn(6, taps), "bias": drawn(6)}
    position = positions([1, 2, 3, 30, 4], [40])
    assert_as_exact(causal_conv, twin, {**inputs, "position": position})
    together = causal_conv(**inputs, position=position)[0]
    alone = torch.cat([causal_conv(piece, inputs["weight"], inputs["bias"])[0]
                       for piece in inputs["x"][:1].split([1, 2, 3, 30, 4], dim=1)])  # fmt: skip
    assert together.equal(alone)


def test_sums_of_taps_and_bias_run_over_all_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SPAN", 2 * kernel.BACKWARD_TOKENS)
    length = 2 * kernel.SPAN + 3
    assert_as_exact(causal_conv, twin, {"x": drawn(1, length, 2), "weight": drawn(2, 4), "bias": drawn(2)})


def test_it_goes_on_from_earlier_inputs() -> None:
    x, weight, bias = drawn(2, 12, 5), drawn(5, 4), drawn(5)
    whole = causal_conv(x, weight, bias)
    for cut in (3, 7):
        assert causal_conv(x[:, cut:], weight, bias, before=x[:, cut - 3 : cut]).equal(whole[:, cut:])


def test_more_taps_than_the_kernel_has_are_left_to_pytorch() -> None:
    inputs = {"x": drawn(2, 9, 5, scale=2.0), "weight": drawn(5, 6), "bias": drawn(5)}
    assert_as_exact(TritonElementwise().causal_conv, twin, inputs)


def test_bf16_is_rounded_once() -> None:
    inputs = {"x": drawn(1, 35, 9), "weight": drawn(9, 4), "bias": drawn(9)}
    assert_as_exact(causal_conv, twin, {name: value.bfloat16() for name, value in inputs.items()})
