"""The chunked distillation loss against plain `log_softmax` in fp64, its memory, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elastic.distill.kl import distillation_loss
from tests.unit.distill.distillation_cases import Case, Reference, loss_of, relative_error

SHAPES = [(10, 37, 8, 8), (23, 128, 16, 24), (64, 500, 12, 32)]  # tokens, vocabulary, student's and teacher's width
TERMS = [(1.0, 0.0), (1.0, 0.3), (0.0, 1.0), (0.7, 0.3)]  # weights of KL and cross-entropy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 2048])
def test_equals_the_fp64_definition(
    shape: tuple[int, int, int, int], terms: tuple[float, float], temperature: float, chunk_tokens: int
) -> None:
    case = Case.draw(*shape, scale=3.0, weighted=chunk_tokens != 3).leaves()
    expected = Reference.of(case, *terms, temperature)
    actual = loss_of(case, *terms, temperature, chunk_tokens, report_cross_entropy=True)
    (2.5 * actual.total).backward()
    assert actual.total.dtype == torch.float32
    assert relative_error(actual.total.detach(), expected.total) < 1e-6
    assert relative_error(actual.kl, expected.kl) < 1e-6
    assert relative_error(actual.cross_entropy, expected.cross_entropy) < 1e-6
    assert relative_error(case.student_hidden.grad, 2.5 * expected.hidden_grad) < 1e-5
    assert relative_error(case.student_head.grad, 2.5 * expected.head_grad) < 1e-5


@pytest.mark.parametrize("chunk_tokens", [5, 23])
def test_cross_entropy_alone_needs_no_teacher(chunk_tokens: int) -> None:
    case = Case.draw(23, 128, 16, 24).leaves()
    expected = Reference.of(case, 0.0, 0.8, 2.0)
    actual = distillation_loss(
        case.student_hidden,
        case.student_head,
        None,
        None,
        case.labels,
        case.token_weights,
        kl_weight=0.0,
        cross_entropy_weight=0.8,
        temperature=2.0,
        chunk_tokens=chunk_tokens,
        tp_group=None,
    )
    actual.total.backward()
    assert actual.kl is None
    assert relative_error(actual.total.detach(), expected.total) < 1e-6
    assert relative_error(actual.cross_entropy, expected.cross_entropy) < 1e-6
    assert relative_error(case.student_hidden.grad, expected.hidden_grad) < 1e-5
    assert relative_error(case.student_head.grad, expected.head_grad) < 1e-5


def test_head_may_be_a_strided_prefix_of_a_wider_one() -> None:
    case = Case.draw(12, 40, 6, 10).leaves()
    wide_head = torch.randn(40, 10)
    wide_head[:, :6] = case.student_head.detach()
    wide_head.requires_grad_()
    sliced = replace(case, student_head=wide_head[:, :6])
    loss_of(sliced, chunk_tokens=3).total.backward()
    expected = Reference.of(case, 1.0, 0.0, 1.0)
    assert wide_head.grad is not None
    assert relative_error(wide_head.grad[:, :6], expected.head_grad) < 1e-5
    assert not wide_head.grad[:, 6:].any()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_gradcheck_in_fp64(temperature: float, with_teacher: bool) -> None:
    case = Case.draw(5, 9, 3, 4, dtype=torch.float64).leaves()

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        return distillation_loss(
            hidden,
            head,
            case.teacher_hidden if with_teacher else None,
            case.teacher_head if with_teacher else None,
            case.labels,
            case.token_weights,
            kl_weight=0.6 if with_teacher else 0.0,
            cross_entropy_weight=0.3,
            temperature=temperature,
            chunk_tokens=3,
            tp_group=None,
        ).total

    assert torch.autograd.gradcheck(total, (case.student_hidden, case.student_head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk_tokens", [3, 11])
def test_student_equal_to_teacher_gives_exactly_zero(dtype: torch.dtype, chunk_tokens: int) -> None:
    # Not just small: Adam blows rounding noise up to full-size steps.
    teacher = Case.draw(11, 50, 8, 8, dtype=dtype, scale=5.0)
    case = replace(teacher, student_hidden=teacher.teacher_hidden, student_head=teacher.teacher_head).leaves()
    for temperature in (1.0, 3.0):
        terms = loss_of(case, temperature=temperature, chunk_tokens=chunk_tokens)
        terms.total.backward()
        assert terms.total.item() == 0
        assert case.student_hidden.grad is not None and not case.student_hidden.grad.any()
        assert case.student_head.grad is not None and not case.student_head.grad.any()


@pytest.mark.parametrize("shift", [-30.0, 300.0])
def test_a_constant_added_to_a_tokens_logits_changes_nothing(shift: float) -> None:
    case = Case.draw(9, 60, 7, 7)
    ones, offsets = torch.ones(60, 1), torch.linspace(0.5, 1.0, 9).unsqueeze(1) * shift
    shifted = replace(
        case,
        student_hidden=torch.cat([case.student_hidden, offsets], 1),
        student_head=torch.cat([case.student_head, ones], 1),
        teacher_hidden=torch.cat([case.teacher_hidden, -offsets], 1),
        teacher_head=torch.cat([case.teacher_head, ones], 1),
    ).leaves()
    plain, moved = loss_of(case, 1.0, 0.3, 2.0), loss_of(shifted, 1.0, 0.3, 2.0)
    torch.testing.assert_close(moved.total.detach(), plain.total, rtol=1e-4, atol=0)
    moved.total.backward()
    grad = shifted.student_hidden.grad
    assert grad is not None
    # The loss does not move along the constant: the sum of its gradient over the vocabulary is 0.
    assert grad[:, -1].abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_extreme_logits_stay_finite(temperature: float) -> None:
    case = Case.draw(8, 33, 4, 4, scale=1e4).leaves()
    terms = loss_of(case, 1.0, 0.3, temperature, chunk_tokens=3)
    terms.total.backward()
    expected = Reference.of(case, 1.0, 0.3, temperature)
    assert relative_error(terms.total.detach(), expected.total) < 1e-5
    for grad in (case.student_hidden.grad, case.student_head.grad):
        assert grad is not None and torch.isfinite(grad).all()
