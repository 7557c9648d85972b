"""Norms, squared ReLU and residual with their gates (in Triton's interpreter where there is no GPU) against fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.kernels import gated, gated_norm
from tests.unit.kernels.precision import DEVICE, assert_as_exact, drawn


def norm_twin(
    x: Tensor, weight: Tensor, active: Tensor | float | None, epsilon: float, groups: int = 1, z: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    active = active if gate is None else gate.unflatten(0, (groups, -1)).sum(-1, keepdim=True)
    u = x if z is None else x * F.silu(z)
    u = u if gate is None else u * gate
    grouped = u.unflatten(-1, (groups, -1))
    normal = grouped * torch.rsqrt(grouped.square().sum(-1, keepdim=True) / active + epsilon)
    return normal.flatten(-2) * weight


def relu_twin(x: Tensor, gate: Tensor | None = None) -> Tensor:
    y = F.relu(x).square()
    return y if gate is None else y * gate


def residual_twin(x: Tensor, y: Tensor, depth: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    y = y if hidden is None else hidden * y
    return x + (y if depth is None else depth * y)


def norm_inputs(s: int, b: int, columns: int, groups: int, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    width = columns * groups
    return {"x": drawn(s, b, width, scale=scale), "weight": drawn(width), "epsilon": 1e-5, "groups": groups, **more}


NORMS = [(1, 1, 1, 1), (5, 2, 37, 1), (3, 2, 20, 4), (2, 3, 513, 2)]


@pytest.mark.parametrize(
    ("s", "b", "columns", "groups", "scale"),
    [*((*norm, 1.0) for norm in NORMS), *((2, 1, 37, 2, scale) for scale in (1e-3, 1e4))],
)
@pytest.mark.parametrize("parts", ["", "z", "gate", "z gate"])
def test_norm_equals_fp64(s: int, b: int, columns: int, groups: int, scale: float, parts: str) -> None:
    inputs = norm_inputs(s, b, columns, groups, scale, active=torch.tensor(0.7 * columns, device=DEVICE))
    if "z" in parts:
        inputs["z"] = drawn(s, b, columns * groups + 3)[..., 2:-1]  # rows of wider rows
    if "gate" in parts:
        inputs |= {"gate": drawn(columns * groups).abs(), "active": None}
    assert_as_exact(gated_norm.gated_norm, norm_twin, inputs)


def test_norm_of_many_rows_sums_over_the_rows_of_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_norm, "MAX_PROGRAMS", 8)
    inputs = norm_inputs(3, 5, 3, 2, active=2)
    assert inputs["x"].shape[0] * inputs["x"].shape[1] > 2 * gated_norm.MAX_PROGRAMS / inputs["groups"]
    assert_as_exact(gated_norm.gated_norm, norm_twin, inputs)


def test_norm_of_sequences_that_lie_one_after_the_other() -> None:
    inputs = norm_inputs(4, 3, 10, 2, active=10.0, z=drawn(3, 4, 25)[..., :20].transpose(0, 1))
    inputs["x"] = drawn(3, 4, 20).transpose(0, 1)
    assert_as_exact(gated_norm.gated_norm, norm_twin, inputs)


@pytest.mark.parametrize("columns", [40, 1280])
def test_norm_in_bf16_is_rounded_once(columns: int) -> None:
    inputs = norm_inputs(3, 2, columns, 2, active=None, gate=drawn(2 * columns).abs())
    inputs |= {name: inputs[name].bfloat16() for name in ("x", "weight")}
    inputs["z"] = drawn(3, 2, 2 * columns, dtype=torch.bfloat16)
    assert_as_exact(gated_norm.gated_norm, norm_twin, inputs)


def test_rows_of_zeros_stay_zeros() -> None:
    inputs = norm_inputs(2, 2, 9, 1, scale=0.0, active=torch.tensor(9.0, device=DEVICE), z=drawn(2, 2, 9))
    assert_as_exact(gated_norm.gated_norm, norm_twin, inputs)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 257), (9, 5, 11), (2, 1, 1024)])
@pytest.mark.parametrize("gates", ["", "hidden", "depth", "hidden depth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_relu_and_residual_equal_fp64(shape: tuple[int, ...], gates: str, dtype: torch.dtype) -> None:
    hidden = {"hidden": drawn(shape[-1])} if "hidden" in gates else {}
    depth = {"depth": torch.tensor(0.3, device=DEVICE)} if "depth" in gates else {}
    x, y = drawn(*shape, scale=3.0, dtype=dtype), drawn(*shape[::-1], dtype=dtype).reshape(shape)
    assert_as_exact(gated.squared_relu, relu_twin, {"x": x} | ({"gate": hidden["hidden"]} if hidden else {}))
    assert_as_exact(gated.residual, residual_twin, {"x": x, "y": y, **hidden, **depth})


def test_the_rows_of_several_tiles_are_summed_for_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "MAX_PROGRAMS", 3)
    inputs = {"x": drawn(60, 1, 3), "gate": drawn(3)}
    assert len(inputs["x"]) > 2 * gated.ROWS * gated.MAX_PROGRAMS
    assert_as_exact(gated.squared_relu, relu_twin, inputs)


def test_the_front_of_wider_rows_is_read_where_it_lies() -> None:
    wide, gate = drawn(4, 2, 50), drawn(40)
    inputs = {"x": wide[..., :40], "y": drawn(2, 4, 60)[..., :40].transpose(0, 1), "hidden": gate}
    assert_as_exact(gated.residual, residual_twin, inputs)
    assert_as_exact(gated.squared_relu, relu_twin, {"x": wide[..., :40], "gate": gate})


def test_extreme_values() -> None:
    x = torch.tensor([[-1e18, -0.0, 0.0, 1e-18, 1e18]], device=DEVICE)
    assert gated.squared_relu(x).tolist() == F.relu(x).square().tolist()
    assert gated.residual(x, x, None, torch.zeros(5, device=DEVICE)).equal(x)
