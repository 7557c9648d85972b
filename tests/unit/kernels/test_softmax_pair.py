"""The loss's chunk in two Triton kernels (in Triton's interpreter where there is no GPU) against fp64."""

import pytest
import torch
from torch import Tensor

from elastic.distill.chunk import LossSettings, VocabShard, chunk_loss, fused_chunk_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU in Triton's interpreter


def draw(num_rows: int, num_columns: int, scale: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * num_columns)
    student, teacher = (scale * torch.randn(num_rows, num_columns, generator=generator) for _ in range(2))
    labels = torch.randint(num_columns, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator) * (torch.arange(num_rows) % 3 != 2)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), labels.to(DEVICE), weights.to(DEVICE)


def settings(shape: int, kl: float, cross_entropy: float, tau: float, with_grad: bool = True) -> LossSettings:
    return LossSettings(kl, cross_entropy, tau, with_grad, VocabShard(0, shape, shape, None))


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("shape", [(1, 2), (5, 37), (2, 4096), (1, 4097), (2, 9001)])
@pytest.mark.parametrize("terms", [(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)])
@pytest.mark.parametrize(("tau", "scale"), [(1.0, 30.0), (2.0, 1.0), (0.7, 30.0)])
def test_losses_and_gradient_equal_fp64(
    shape: tuple[int, int], terms: tuple[float, float], tau: float, scale: float
) -> None:
    student, teacher, labels, weights = draw(*shape, scale)
    how = settings(shape[1], *terms, tau)
    expected, gradient = chunk_loss(student.double(), teacher.double(), labels, weights.double(), how)
    plain, plain_gradient = chunk_loss(student.clone(), teacher.clone(), labels, weights, how)
    found, found_gradient = fused_chunk_loss(student.clone(), teacher, labels, weights, how, torch.float32)
    assert gradient is not None and plain_gradient is not None and found_gradient is not None
    # What fp32 loses in plain PyTorch is the measure: sums in another order lose as much, a wrong formula far more.
    for mine, theirs, right in ((found, plain, expected), (found_gradient, plain_gradient, gradient)):
        assert worst(mine, right) <= 8 * max(worst(theirs, right), 2.0**-23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_student_equal_to_teacher_gives_exactly_zero(dtype: torch.dtype, tau: float) -> None:
    student, _, labels, weights = draw(6, 5000, 5.0, dtype)
    losses, gradient = fused_chunk_loss(
        student.clone(), student.clone(), labels, weights, settings(5000, 1.0, 0.0, tau), dtype
    )
    assert gradient is not None and gradient.dtype == dtype
    assert losses[0] == 0 and not gradient.any()


def test_a_constant_added_to_the_teachers_logits_changes_nothing() -> None:
    student, teacher, labels, weights = draw(7, 5003, 1.0)
    how = settings(5003, 1.0, 0.3, 1.7)
    losses = [
        fused_chunk_loss(student.clone(), teacher + shift, labels, weights, how, torch.float32)[0]
        for shift in (0.0, 300.0)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_no_teacher_no_labels_no_gradient() -> None:
    student, _, labels, weights = draw(5, 700, 2.0)
    kept = student.clone()
    without_gradient = settings(700, 0.0, 1.0, 1.0, with_grad=False)
    losses, gradient = fused_chunk_loss(student, None, labels, weights, without_gradient, torch.float32)
    expected, _ = chunk_loss(kept.double(), None, labels, weights.double(), without_gradient)
    assert gradient is None and student.equal(kept)
    assert worst(losses, expected) < 1e-5
    wrong = labels.clone()
    wrong[0] = 700
    assert fused_chunk_loss(student, None, wrong, weights, without_gradient, torch.float32)[0][1].isnan()


def test_rows_of_a_wider_tensor_and_bf16_logits() -> None:
    student, teacher, labels, weights = draw(5, 1000, 2.0, torch.bfloat16)
    wide = torch.zeros(5, 1500, dtype=torch.bfloat16, device=DEVICE)
    wide[:, 100:1100] = student
    how = settings(1000, 0.6, 0.4, 1.3)
    losses, gradient = fused_chunk_loss(wide[:, 100:1100], teacher, labels, weights, how, torch.float32)
    expected, right = chunk_loss(student.double(), teacher.double(), labels, weights.double(), how)
    assert gradient is not None and right is not None
    assert worst(losses, expected) < 1e-5 and worst(gradient, right) < 1e-5
    assert not wide[:, :100].any() and not wide[:, 1100:].any()
