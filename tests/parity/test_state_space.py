"""The PyTorch scan and convolution against a token-by-token recurrence in fp64 and against stock transformers."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from elastic.model.elementwise import TorchElementwise
from elastic.model.state_space import TorchStateSpace
from tests.parity.model_factory import relative_error
from tests.parity.reference_model import depthwise_causal_conv, state_space_recurrence

LENGTHS = [1, 3, 8, 13, 16, 37]
GROUPS = [1, 2, 4]
BATCH, HEADS_PER_GROUP, CHANNELS, STATE, CHUNK = 2, 3, 5, 7, 8


@dataclass(frozen=True)
class ScanInputs:
    """Leaves of one scan: x [B,L,H,P], dt [B,L,H] before bias and softplus, a_log and d [H], b and c [B,L,G,N]."""

    x: Tensor
    dt: Tensor
    dt_bias: Tensor
    a_log: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    @classmethod
    def draw(cls, length: int, groups: int, dtype: torch.dtype, seed: int = 0) -> "ScanInputs":
        generator, heads = torch.Generator().manual_seed(seed), groups * HEADS_PER_GROUP

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        return cls(
            x=normal(BATCH, length, heads, CHANNELS),
            dt=normal(BATCH, length, heads),
            dt_bias=normal(heads),
            a_log=normal(heads),
            b=normal(BATCH, length, groups, STATE),
            c=normal(BATCH, length, groups, STATE),
            d=normal(heads),
        )

    def to(self, dtype: torch.dtype) -> "ScanInputs":
        return ScanInputs(**{name: t.detach().to(dtype).requires_grad_() for name, t in vars(self).items()})

    def run(self, scan: Any, *more: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the gradients of a fixed weighting of it."""
        y = scan(self.x, self.dt, self.dt_bias, -torch.exp(self.a_log), self.b, self.c, self.d, *more)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad(y, list(vars(self).values()), weights.to(y.dtype))
        return y, list(gradients)


def recurrence(x: Tensor, dt: Tensor, dt_bias: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return state_space_recurrence(x, F.softplus(dt + dt_bias), a, b, c, d)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_the_recurrence_in_fp64(length: int, groups: int) -> None:
    inputs = ScanInputs.draw(length, groups, torch.float64)
    y, gradients = inputs.run(TorchStateSpace(CHUNK).scan)
    expected_y, expected_gradients = inputs.run(recurrence)
    torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-10)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("groups", GROUPS)
def test_scan_in_low_precision_stays_near_the_recurrence(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = ScanInputs.draw(37, groups, dtype)
    y, gradients = inputs.run(TorchStateSpace(CHUNK).scan)
    expected_y, expected_gradients = inputs.to(torch.float64).run(recurrence)
    assert y.dtype is dtype
    assert relative_error(y, expected_y) <= tolerance
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        assert relative_error(actual, expected) <= 2 * tolerance


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_scan_does_not_depend_on_the_chunk(chunk: int) -> None:
    inputs = ScanInputs.draw(13, 2, torch.float64)
    torch.testing.assert_close(inputs.run(TorchStateSpace(chunk).scan), inputs.run(TorchStateSpace(5).scan))


def numbers_of(sizes: list[int]) -> Tensor:
    """Return the number of each token's document, the same in every row."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).int().expand(BATCH, -1)


@pytest.mark.parametrize("sizes", [[20], [1] * 20, [8, 8, 4], [7, 2, 7, 1, 3], [13, 1, 6], [3, 17]])
def test_the_scan_begins_anew_at_each_document(sizes: list[int]) -> None:
    """On and beside the edges of the chunks of 8, several in one chunk, one over several, of one token."""

    def alone(x: Tensor, dt: Tensor, dt_bias: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        pieces = zip(*(t.split(sizes, dim=1) for t in (x, dt, b, c)), strict=True)
        return torch.cat([recurrence(x_, dt_, dt_bias, a, b_, c_, d) for x_, dt_, b_, c_ in pieces], dim=1)

    inputs = ScanInputs.draw(sum(sizes), 2, torch.float64)
    y, gradients = inputs.run(TorchStateSpace(CHUNK).scan, None, numbers_of(sizes))
    expected_y, expected_gradients = inputs.run(alone)
    torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-10)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_no_gradient_reaches_another_document() -> None:
    """Exactly none, also where decays underflow; everything stays finite."""
    inputs = ScanInputs.draw(20, 2, torch.float32)
    strong = ScanInputs(**{**vars(inputs), "a_log": torch.full_like(inputs.a_log, 10.0).requires_grad_()})
    for leaves in (inputs, strong):
        arguments = (leaves.dt_bias, -torch.exp(leaves.a_log), leaves.b, leaves.c, leaves.d)
        y = TorchStateSpace(CHUNK).scan(leaves.x, leaves.dt, *arguments, None, numbers_of([5, 6, 9]))
        of_tokens = (leaves.x, leaves.dt, leaves.b, leaves.c)
        for gradient in torch.autograd.grad(y[:, 5:11].square().sum(), of_tokens):
            assert gradient.isfinite().all() and gradient[:, 5:11].abs().max() > 0
            assert not gradient[:, :5].any() and not gradient[:, 11:].any()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("sizes", [[20], [1] * 20, [13, 1, 6], [1, 1, 17, 1], [3, 8, 9]])
def test_a_scan_in_pieces_equals_the_recurrence_in_fp64(sizes: list[int], groups: int) -> None:
    """The state is handed from piece to piece; a single token takes a step, a piece below a chunk a shorter chunk."""
    inputs = ScanInputs.draw(sum(sizes), groups, torch.float64)
    expected, _ = inputs.run(recurrence)
    heads, backend = groups * HEADS_PER_GROUP, TorchStateSpace(CHUNK)
    state = torch.zeros(BATCH, heads, CHANNELS, STATE, dtype=torch.float64)
    pieces = (t.detach().split(sizes, dim=1) for t in (inputs.x, inputs.dt, inputs.b, inputs.c))
    with torch.no_grad():
        y = [
            backend.scan(x, dt, inputs.dt_bias, -torch.exp(inputs.a_log), b, c, inputs.d, state)
            for x, dt, b, c in zip(*pieces, strict=True)
        ]
    torch.testing.assert_close(torch.cat(y, dim=1), expected.detach(), rtol=1e-10, atol=1e-10)
    # The state itself: S_T = sum_t exp(A sum_{u>t} dt_u) dt_t x_t B_t^T.
    dt, a = F.softplus(inputs.dt + inputs.dt_bias), -torch.exp(inputs.a_log)
    later = dt.flip(1).cumsum(1).flip(1) - dt
    b_of_head = inputs.b.repeat_interleave(HEADS_PER_GROUP, dim=2)
    final = torch.einsum("blh,blhp,blhn->bhpn", (later * a).exp() * dt, inputs.x, b_of_head)
    torch.testing.assert_close(state, final.detach(), rtol=1e-10, atol=1e-10)


def test_a_step_in_bf16_keeps_its_state_in_fp32() -> None:
    """Sixty steps in bf16 with an fp32 state stay as near to the recurrence as one scan does."""
    inputs = ScanInputs.draw(60, 2, torch.bfloat16)
    expected, _ = inputs.to(torch.float64).run(recurrence)
    state, backend = torch.zeros(BATCH, 2 * HEADS_PER_GROUP, CHANNELS, STATE), TorchStateSpace(CHUNK)
    pieces = (t.detach().split(1, dim=1) for t in (inputs.x, inputs.dt, inputs.b, inputs.c))
    with torch.no_grad():
        y = torch.cat(
            [
                backend.scan(x, dt, inputs.dt_bias, -torch.exp(inputs.a_log.float()), b, c, inputs.d, state)
                for x, dt, b, c in zip(*pieces, strict=True)
            ],
            dim=1,
        )
    assert y.dtype is torch.bfloat16 and state.dtype is torch.float32
    assert relative_error(y, expected) <= 2e-2


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [2, 1, 9], [1, 7, 4]])
def test_a_convolution_in_pieces_equals_the_whole(sizes: list[int], taps: int) -> None:
    x, weight, bias = torch.randn(BATCH, 12, 5).double(), torch.randn(5, taps).double(), torch.randn(5).double()
    before = torch.zeros(BATCH, taps - 1, 5).double()
    y = [TorchElementwise().causal_conv(piece, weight, bias, before) for piece in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(y, dim=1), F.silu(depthwise_causal_conv(x, weight, bias)))
    assert torch.equal(before, x[:, 12 - (taps - 1) :])


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_no_tap_reaches_over_the_start_of_a_document(taps: int) -> None:
    sizes = [1, 2, 6, 3]
    x, weight, bias = (torch.randn(size).double().requires_grad_() for size in ((BATCH, 12, 5), (5, taps), (5,)))
    positions = torch.cat([torch.arange(size) for size in sizes]).int().expand(BATCH, -1)
    alone = [F.silu(depthwise_causal_conv(piece, weight, bias)) for piece in x.split(sizes, dim=1)]
    y, expected = TorchElementwise().causal_conv(x, weight, bias, None, positions), torch.cat(alone, dim=1)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(of.sin().sum(), (x, weight, bias)) for of in (y, expected))
    torch.testing.assert_close(found, wanted)


def test_scan_survives_decays_that_underflow() -> None:
    """exp(dt A) of -1e4 is 0 in fp32: outputs and gradients stay finite, nothing is carried."""
    inputs = ScanInputs.draw(37, 1, torch.float32)
    strong = ScanInputs(**{**vars(inputs), "a_log": torch.full_like(inputs.a_log, 10.0).requires_grad_()})
    y, gradients = strong.run(TorchStateSpace(CHUNK).scan)
    assert all(torch.isfinite(t).all() for t in (y, *gradients))
    assert relative_error(y, strong.to(torch.float64).run(recurrence)[0]) <= 2e-6


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 5, 13])
def test_pitfall_06_convolution_equals_the_definition(length: int, taps: int) -> None:
    """Any kernel size, not only 4, also longer than the sequence."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((BATCH, length, 6), (6, taps), (6,))
    ]
    y, expected = TorchElementwise().causal_conv(*leaves), F.silu(depthwise_causal_conv(*leaves))
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, weights), torch.autograd.grad(expected, leaves, weights))


def _stock_mixer(groups: int, conv_kernel: int) -> NemotronHMamba2Mixer:
    config = NemotronHConfig(
        hybrid_override_pattern="M",
        hidden_size=12,
        mamba_num_heads=groups * HEADS_PER_GROUP,
        mamba_head_dim=CHANNELS,
        n_groups=groups,
        ssm_state_size=STATE,
        conv_kernel=conv_kernel,
        chunk_size=CHUNK,
        layer_norm_epsilon=1e-5,
        time_step_min=0.0,
        head_dim=4,
    )
    mixer = NemotronHMamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.normal_(std=1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
            if name in ("norm.weight", "D"):
                parameter.add_(1.0)
    return mixer.train()


def _mixer_from_our_parts(p: dict[str, Tensor], u: Tensor, backend: TorchStateSpace, groups: int) -> Tensor:
    """Assemble the same mixer around the backend: what Megatron-Core's mixer does on one rank."""
    heads = groups * HEADS_PER_GROUP
    inner, gn = heads * CHANNELS, groups * STATE
    z, conv_in, dt = (u @ p["in_proj.weight"].T).split([inner, inner + 2 * gn, heads], dim=-1)
    conv = TorchElementwise().causal_conv(conv_in, p["conv1d.weight"].squeeze(1), p["conv1d.bias"])
    x, b, c = conv.split([inner, gn, gn], dim=-1)
    y = backend.scan(
        x.unflatten(-1, (heads, CHANNELS)),
        dt,
        p["dt_bias"],
        -torch.exp(p["A_log"]),
        b.unflatten(-1, (groups, STATE)),
        c.unflatten(-1, (groups, STATE)),
        p["D"],
    )
    grouped = (y.flatten(-2) * F.silu(z)).unflatten(-1, (groups, -1))
    return (F.rms_norm(grouped, grouped.shape[-1:], eps=1e-5).flatten(-2) * p["norm.weight"]) @ p["out_proj.weight"].T


@pytest.mark.parametrize(("groups", "conv_kernel"), [(1, 4), (2, 3), (4, 4)])
@pytest.mark.parametrize("length", [1, 13, 16])
def test_mixer_equals_stock_transformers(length: int, groups: int, conv_kernel: int) -> None:
    mixer = _stock_mixer(groups, conv_kernel)
    parameters = dict(mixer.named_parameters())
    u = torch.randn(BATCH, length, 12, requires_grad=True)
    leaves = [u, *parameters.values()]
    ours, theirs = _mixer_from_our_parts(parameters, u, TorchStateSpace(CHUNK), groups), mixer(u)
    assert relative_error(ours, theirs) <= 1e-5
    weights = torch.randn_like(theirs)
    for name, actual, expected in zip(
        ["input", *parameters],
        torch.autograd.grad(ours, leaves, weights),
        torch.autograd.grad(theirs, leaves, weights),
        strict=True,
    ):
        assert relative_error(actual, expected) <= 1e-4, name
