"""Norms divide by the active width: a masked input gives what the narrow input alone would give."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.model.elementwise import TorchElementwise
from elastic.model.masks import Width
from elastic.model.norm import ElasticRMSNorm, GatedGroupNorm

EPSILON = 1e-2  # large, so that a wrongly scaled epsilon shows


def config(dtype: torch.dtype = torch.float64, sequence_parallel: bool = False) -> SimpleNamespace:
    """Stand in for the fields of TransformerConfig that a norm reads."""
    return SimpleNamespace(use_cpu_initialization=True, params_dtype=dtype, sequence_parallel=sequence_parallel)


def rms_norm(size: int, **settings: object) -> ElasticRMSNorm:
    norm = ElasticRMSNorm(config(**settings), size, eps=EPSILON, elementwise=TorchElementwise())  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size))
    return norm


def group_norm(size: int) -> GatedGroupNorm:
    norm = GatedGroupNorm(size, config(), None, EPSILON, TorchElementwise())  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size))
    return norm


def prefix(width: int, size: int) -> Tensor:
    return (torch.arange(size) < width).double()


@pytest.mark.parametrize("width", [1, 7, 12])
def test_pitfall_01_rms_norm_of_a_masked_stream_is_that_of_the_narrow_one(width: int) -> None:
    norm, x = rms_norm(12), torch.randn(3, 2, 12, dtype=torch.float64)
    mask = prefix(width, 12)
    masked = norm(x * mask, Width(mask.sum(), mask))
    narrow = norm(x[..., :width], Width(width))
    torch.testing.assert_close(masked[..., :width], narrow)
    assert torch.count_nonzero(masked[..., width:]) == 0
    torch.testing.assert_close(narrow, F.rms_norm(x[..., :width], (width,), norm.weight[:width], EPSILON))


def test_rms_norm_under_a_soft_gate_divides_by_the_sum_of_the_gate() -> None:
    norm, x = rms_norm(12), torch.randn(3, 2, 12, dtype=torch.float64)
    gate = 0.25 * prefix(4, 12) + 0.75 * prefix(12, 12)
    gated = x * gate
    expected = gated / torch.sqrt((gated**2).sum(-1, keepdim=True) / gate.sum() + EPSILON) * norm.weight
    torch.testing.assert_close(norm(gated, Width(gate.sum(), gate)), expected)


def test_rms_norm_gradient_reaches_the_gate_through_the_divisor() -> None:
    norm, x = rms_norm(6), torch.randn(2, 6, dtype=torch.float64)
    gate = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: norm(x * g, Width(g.sum(), g)), gate)
    frozen_divisor = torch.autograd.grad(norm(x * gate, Width(gate.sum().detach(), gate)).sum(), gate)[0]
    assert not torch.allclose(
        frozen_divisor, torch.autograd.grad(norm(x * gate, Width(gate.sum(), gate)).sum(), gate)[0]
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kept_heads", [1, 2, 3])
@pytest.mark.parametrize("kept_channels", [1, 3, 5])
def test_pitfall_20_group_norm_counts_the_active_heads_and_channels_of_each_group(
    groups: int, kept_heads: int, kept_channels: int
) -> None:
    """Not one norm over all heads, and not the full group size: heads and channels, per group."""
    heads, channels = 3, 5
    norm = group_norm(groups * heads * channels)
    y = torch.randn(2, 3, groups, heads, channels, dtype=torch.float64)
    mask = prefix(kept_heads, heads)[:, None] * prefix(kept_channels, channels)
    z, gate = torch.randn_like(y), mask.expand(groups, -1, -1).flatten()
    masked = norm(y.flatten(2), z.flatten(2), groups, None, gate)
    masked = masked.unflatten(2, (groups, heads, channels))
    small, small_z = (t[..., :kept_heads, :kept_channels] for t in (y, z))
    weight = norm.weight.view(groups, heads, channels)[:, :kept_heads, :kept_channels]
    sliced = norm(small.flatten(2), small_z.flatten(2), groups, kept_heads * kept_channels, None, weight.flatten())
    torch.testing.assert_close(masked[..., :kept_heads, :kept_channels].flatten(2), sliced)
    for group in range(groups):  # every group by itself
        own = (small * F.silu(small_z))[:, :, group].flatten(2)
        expected = F.rms_norm(own, own.shape[-1:], weight[group].flatten(), EPSILON)
        torch.testing.assert_close(sliced.unflatten(2, (groups, -1))[:, :, group], expected)


def test_statistics_are_at_least_fp32() -> None:
    """Squares of bf16 values near 300 would lose the epsilon and most digits; the result has the input's dtype."""
    x = (300 * torch.randn(4, 512)).bfloat16()
    y = TorchElementwise().norm(x, torch.ones(512, dtype=torch.bfloat16), 512, 1e-5)
    expected = x.double() * torch.rsqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-5)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)


def test_all_zero_input_stays_finite() -> None:
    x = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    y = TorchElementwise().norm(x, torch.ones(8, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64), 1e-5)
    y.sum().backward()
    assert torch.count_nonzero(y) == 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_replicated_weight_is_marked_for_sequence_parallelism(sequence_parallel: bool) -> None:
    assert rms_norm(4, sequence_parallel=sequence_parallel).weight.sequence_parallel is sequence_parallel
    weight = group_norm(4).weight
    assert weight.tensor_model_parallel and weight.partition_dim == 0
