"""mamba-ssm's and causal-conv1d's kernels compute what the PyTorch backend computes, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.model.state_space import StateSpaceBackend, TorchStateSpace
from tests.parity.model_factory import relative_error

pytestmark = pytest.mark.gpu

BATCH, STATE = 2, 32


@pytest.fixture(scope="module")
def kernels() -> StateSpaceBackend:
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed; it comes with the `gpu` extra")
    pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed; it comes with the `gpu` extra")
    from elastic.model.state_space import MambaSsmStateSpace

    return MambaSsmStateSpace(chunk_tokens=64)


def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=torch.float32).to(dtype).requires_grad_()


def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: list[Tensor], tolerance: float) -> None:
    """Compare two functions of the same leaves: values, then the gradients of a random weighting."""
    actual, expected = ours(), theirs()
    assert actual.dtype is expected.dtype
    assert relative_error(actual, expected) <= tolerance
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, leaves, weights) for y in (actual, expected))
    for index, (one, other) in enumerate(zip(*gradients, strict=True)):
        assert relative_error(one, other) <= 2 * tolerance, index


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("channels", [16, 80, 37])
@pytest.mark.parametrize("length", [64, 200])
def test_scan(
    kernels: StateSpaceBackend, length: int, channels: int, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    """The fp32 tolerance allows for TF32, which Triton's matrix products use."""
    heads = 2 * groups
    x, raw_dt = draw(BATCH, length, heads, channels, dtype=dtype), draw(BATCH, length, heads)
    b, c = (draw(BATCH, length, groups, STATE, dtype=dtype) for _ in range(2))
    a_log, d = draw(heads), draw(heads)

    def run(backend: StateSpaceBackend) -> Tensor:
        return backend.scan(x, F.softplus(raw_dt - 2), -torch.exp(a_log), b, c, d)

    compare(lambda: run(kernels), lambda: run(TorchStateSpace(64)), [x, raw_dt, b, c, a_log, d], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("channels", [64, 40, 37])
@pytest.mark.parametrize("taps", [2, 4])
def test_pitfall_06_convolution_of_any_width(
    kernels: StateSpaceBackend, taps: int, channels: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Also for a number of channels that is no multiple of 8, and for rows that are a part of wider rows."""
    rows = draw(BATCH, 50, 3 + 2 * channels, dtype=dtype)
    weight, bias = draw(channels, taps, dtype=dtype), draw(channels, dtype=dtype)

    def run(backend: StateSpaceBackend) -> Tensor:
        return backend.causal_conv(rows[..., channels : 2 * channels], weight, bias)

    compare(lambda: run(kernels), lambda: run(TorchStateSpace()), [rows, weight, bias], tolerance)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("channels", [16, 80, 37])
@pytest.mark.parametrize("sizes", [[100, 1, 1, 64, 1, 33], [1] * 8, [130, 70]])
def test_scan_in_pieces(
    kernels: StateSpaceBackend, sizes: list[int], channels: int, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Pieces and single steps of the kernels against one PyTorch scan of the whole, outputs and last state."""
    heads, length = 2 * groups, sum(sizes)
    x, raw_dt = draw(BATCH, length, heads, channels, dtype=dtype), draw(BATCH, length, heads)
    b, c = (draw(BATCH, length, groups, STATE, dtype=dtype) for _ in range(2))
    a, d, dt = -torch.exp(draw(heads)), draw(heads), F.softplus(raw_dt - 2)
    plain, expected_state = TorchStateSpace(64), torch.zeros(BATCH, heads, channels, STATE, device="cuda")
    expected = plain.scan(x, dt, a, b, c, d, expected_state)
    state = torch.zeros_like(expected_state)
    pieces = zip(*(t.split(sizes, dim=1) for t in (x, dt, b, c)), strict=True)
    y = [kernels.scan(x_, dt_, a, b_, c_, d, state) for x_, dt_, b_, c_ in pieces]
    assert y[0].dtype is dtype
    assert relative_error(torch.cat(y, dim=1), expected) <= tolerance
    assert relative_error(state, expected_state) <= tolerance


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("channels", [64, 40, 37])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("sizes", [[20, 1, 1, 9, 1], [1] * 6])
def test_convolution_in_pieces(
    kernels: StateSpaceBackend, sizes: list[int], taps: int, channels: int, dtype: torch.dtype, tolerance: float
) -> None:
    """The inputs before are moved on by every piece, exactly; rows are a part of wider rows, as in the mixer."""
    rows = draw(BATCH, sum(sizes), 3 + 2 * channels, dtype=dtype)
    x = rows[..., channels : 2 * channels]
    weight, bias = draw(channels, taps, dtype=dtype), draw(channels, dtype=dtype)
    before = torch.zeros(BATCH, taps - 1, channels, device="cuda", dtype=dtype)
    y = [kernels.causal_conv(piece, weight, bias, before) for piece in x.split(sizes, dim=1)]
    assert relative_error(torch.cat(y, dim=1), TorchStateSpace().causal_conv(x, weight, bias)) <= tolerance
    assert torch.equal(before, x[:, sum(sizes) - (taps - 1) :])
