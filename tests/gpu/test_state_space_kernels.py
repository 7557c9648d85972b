"""mamba-ssm's kernels compute what the PyTorch backend computes, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elastic.model.backends import SCAN, missing_parts
from elastic.model.state_space import MambaSsmStateSpace, TorchStateSpace
from tests.parity.model_factory import relative_error

pytestmark = pytest.mark.gpu

BATCH, STATE = 2, 32


@pytest.fixture(scope="module")
def kernels() -> TorchStateSpace:
    missing = dict(missing_parts())
    if SCAN in missing:
        pytest.skip(f"{SCAN.package} does not load: {missing[SCAN]}; it comes with the `gpu` extra")
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
    kernels: TorchStateSpace, length: int, channels: int, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    """The fp32 tolerance allows for TF32, which Triton's matrix products use."""
    heads = 2 * groups
    x, dt = draw(BATCH, length, heads, channels, dtype=dtype), draw(BATCH, length, heads, dtype=dtype)
    b, c = (draw(BATCH, length, groups, STATE, dtype=dtype) for _ in range(2))
    a_log, d, dt_bias = draw(heads), draw(heads), draw(heads)

    def run(backend: TorchStateSpace) -> Tensor:
        return backend.scan(x, dt, dt_bias - 2, -torch.exp(a_log), b, c, d)

    compare(lambda: run(kernels), lambda: run(TorchStateSpace(64)), [x, dt, dt_bias, b, c, a_log, d], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("sizes", [[64, 64, 72], [63, 2, 1, 134], [1] * 200])
def test_scan_of_isolated_documents(
    kernels: TorchStateSpace, sizes: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    heads, groups = 4, 2
    x, dt = draw(BATCH, 200, heads, 16, dtype=dtype), draw(BATCH, 200, heads, dtype=dtype)
    b, c = (draw(BATCH, 200, groups, STATE, dtype=dtype) for _ in range(2))
    a_log, d, dt_bias = draw(heads), draw(heads), draw(heads)
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).int().expand(BATCH, -1).contiguous()

    def run(backend: TorchStateSpace) -> Tensor:
        return backend.scan(x, dt, dt_bias - 2, -torch.exp(a_log), b, c, d, None, numbers.cuda())

    compare(lambda: run(kernels), lambda: run(TorchStateSpace(64)), [x, dt, dt_bias, b, c, a_log, d], tolerance)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("channels", [16, 80, 37])
@pytest.mark.parametrize("sizes", [[100, 1, 1, 64, 1, 33], [1] * 8, [130, 70]])
def test_scan_in_pieces(
    kernels: TorchStateSpace, sizes: list[int], channels: int, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Pieces and single steps of the kernels against one PyTorch scan of the whole, outputs and last state."""
    heads, length = 2 * groups, sum(sizes)
    x, dt = draw(BATCH, length, heads, channels, dtype=dtype), draw(BATCH, length, heads, dtype=dtype)
    b, c = (draw(BATCH, length, groups, STATE, dtype=dtype) for _ in range(2))
    a, d, dt_bias = -torch.exp(draw(heads)), draw(heads), draw(heads) - 2
    plain, expected_state = TorchStateSpace(64), torch.zeros(BATCH, heads, channels, STATE, device="cuda")
    expected = plain.scan(x, dt, dt_bias, a, b, c, d, expected_state)
    state = torch.zeros_like(expected_state)
    pieces = zip(*(t.split(sizes, dim=1) for t in (x, dt, b, c)), strict=True)
    y = [kernels.scan(x_, dt_, dt_bias, a, b_, c_, d, state) for x_, dt_, b_, c_ in pieces]
    assert y[0].dtype is dtype
    assert relative_error(torch.cat(y, dim=1), expected) <= tolerance
    assert relative_error(state, expected_state) <= tolerance
