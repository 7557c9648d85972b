"""The distillation loss where it is easy to get wrong: rounding, frozen parts, no tokens, memory, what does not fit."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from elastic.distill.kl import DistillationError, distillation_loss
from recipes.benchmarks import kl as benchmark
from recipes.benchmarks.memory import peak_extra_bytes
from tests.unit.distill.distillation_cases import Case, Reference, loss_of, relative_error


def test_bf16_gradients_round_the_difference_of_the_softmaxes_not_its_parts() -> None:
    # Student and teacher nearly agree: p and q rounded to bf16 one by one would drown q - p.
    torch.manual_seed(0)
    # Logits that bf16 holds exactly, so that only the loss's own rounding is seen.
    logits = torch.randn(32, 64).mul(2).bfloat16()
    near = (logits.float() * (1 + 2**-6 * torch.randint(-1, 2, (32, 64)))).bfloat16()
    identity = torch.eye(64, dtype=torch.bfloat16)
    case = Case(near, identity, logits, identity, torch.zeros(32, dtype=torch.long), None).leaves()
    loss_of(case, chunk_tokens=8).total.backward()
    expected = Reference.of(case, 1.0, 0.0, 1.0)
    assert relative_error(case.student_hidden.grad, expected.hidden_grad) < 2**-8
    p, q = (side.float().softmax(-1).bfloat16() for side in (logits, near))
    assert relative_error(q - p, expected.hidden_grad) > 2**-8
    assert case.student_head.grad is not None and case.student_head.grad.dtype == torch.bfloat16
    assert relative_error(case.student_head.grad, expected.head_grad) < 2**-6


def test_incoming_gradient_is_not_rounded_to_bf16() -> None:
    case = Case.draw(16, 40, 8, 8, dtype=torch.bfloat16).leaves()
    scale = 1 / 515  # 515 tokens: bf16 would be off by 0.2%, the same way for every parameter
    loss_of(case).total.backward()
    plain = [case.student_hidden.grad, case.student_head.grad]
    case.student_hidden.grad = case.student_head.grad = None
    (scale * loss_of(case).total).backward()
    for before, after in zip(plain, [case.student_hidden.grad, case.student_head.grad], strict=True):
        assert before is not None and after is not None
        assert float(after.double().abs().sum() / before.double().abs().sum() / scale - 1) == pytest.approx(0, abs=7e-4)


def test_backward_twice_gives_the_gradient_twice() -> None:
    case = Case.draw(10, 37, 8, 8).leaves()
    total = loss_of(case, chunk_tokens=4).total
    (first,) = torch.autograd.grad(3.0 * total, case.student_head, retain_graph=True)
    kept = first.clone()
    first.zero_()  # as a collective that works in place would
    (second,) = torch.autograd.grad(3.0 * total, case.student_head)
    torch.testing.assert_close(second, kept, rtol=0, atol=0)


def test_a_gradient_in_the_buffer_cannot_be_scaled_afterwards_and_says_so() -> None:
    case = Case.draw(10, 37, 8, 8).leaves()
    buffer = torch.zeros_like(case.student_head)
    loss_of(case, chunk_tokens=4, head_gradient=buffer).total.backward()
    expected = Reference.of(case, 1.0, 0.0, 1.0)
    assert case.student_head.grad is None
    assert relative_error(buffer, expected.head_grad) < 1e-5
    assert relative_error(case.student_hidden.grad, expected.hidden_grad) < 1e-5
    (0.5 * loss_of(case, chunk_tokens=4, head_gradient=buffer).total).backward()
    assert case.student_hidden.grad is not None and case.student_hidden.grad.isnan().all()


def test_evaluation_and_a_frozen_head_leave_the_buffer_alone() -> None:
    case = Case.draw(10, 37, 8, 8).leaves()
    buffer = torch.zeros_like(case.student_head)
    with torch.no_grad():
        loss_of(case, head_gradient=buffer)
    frozen = replace(case, student_head=case.student_head.detach())
    (0.5 * loss_of(frozen, head_gradient=buffer).total).backward()
    assert not buffer.any()
    assert relative_error(case.student_hidden.grad, 0.5 * Reference.of(case, 1.0, 0.0, 1.0).hidden_grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_saves_memory_of_the_heads_size(dtype: torch.dtype) -> None:
    case = Case.draw(64, 4096, 64, 64, dtype=dtype).leaves()
    buffer = torch.zeros(case.student_head.shape)

    def step(head_gradient: Tensor | None) -> None:
        loss_of(case, chunk_tokens=1, head_gradient=head_gradient).total.backward()
        case.student_hidden.grad = case.student_head.grad = None

    with_autograd, summed = (peak_extra_bytes(partial(step, into), torch.device("cpu")) for into in (None, buffer))
    assert with_autograd > 4 * buffer.numel(), "the measurement sees the sum in fp32"
    assert with_autograd - summed > 0.9 * 4 * buffer.numel()


def test_frozen_parts_get_no_gradient_and_evaluation_computes_none() -> None:
    case = Case.draw(64, 256, 4, 4).leaves()
    frozen_head = replace(case, student_head=case.student_head.detach())
    loss_of(frozen_head, 1.0, 0.3).total.backward()
    expected = Reference.of(case, 1.0, 0.3, 1.0)
    assert relative_error(case.student_hidden.grad, expected.hidden_grad) < 1e-5

    calls = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        terms = loss_of(case, 1.0, 0.3, chunk_tokens=32)
    assert not terms.total.requires_grad
    assert relative_error(terms.total, expected.total) < 1e-6
    assert sum("mm" in call for call in calls) == 4, "two chunks, student's and teacher's logits, nothing more"


def test_cross_entropy_is_reported_without_weight_when_asked() -> None:
    case = Case.draw(10, 37, 8, 8)
    assert loss_of(case).cross_entropy is None
    for temperature in (1.0, 2.0):
        reported = loss_of(case, temperature=temperature, report_cross_entropy=True)
        expected = Reference.of(case, 1.0, 0.0, temperature)
        assert relative_error(reported.cross_entropy, expected.cross_entropy) < 1e-6
        assert relative_error(reported.total, expected.kl) < 1e-6


def test_labels_outside_the_vocabulary_count_only_where_weighted() -> None:
    case = Case.draw(9, 37, 8, 8)
    assert case.token_weights is not None and case.token_weights[2] == 0
    padded = replace(case, labels=case.labels.index_fill(0, torch.tensor([2]), -100)).leaves()
    terms = loss_of(padded, 1.0, 0.3)
    terms.total.backward()
    expected = Reference.of(case, 1.0, 0.3, 1.0)
    assert relative_error(terms.total.detach(), expected.total) < 1e-6
    assert relative_error(padded.student_hidden.grad, expected.hidden_grad) < 1e-5
    beyond = replace(case, labels=case.labels.index_fill(0, torch.tensor([0]), 37))
    assert loss_of(beyond, 1.0, 0.3).total.isnan()


def test_no_tokens_give_zero() -> None:
    case = Case.draw(0, 12, 4, 4).leaves()
    terms = loss_of(case, 1.0, 0.3, chunk_tokens=4)
    terms.total.backward()
    assert terms.total.item() == 0
    assert case.student_head.grad is not None and not case.student_head.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_peak_memory_grows_with_the_chunk_not_with_the_sequence(dtype: torch.dtype, temperature: float) -> None:
    num_tokens, vocab = 512, 2048
    case = Case.draw(num_tokens, vocab, 16, 24, dtype=dtype).leaves()

    def peak(chunk_tokens: int) -> int:
        case.student_hidden.grad = case.student_head.grad = None
        return peak_extra_bytes(
            lambda: loss_of(case, 1.0, 0.3, temperature, chunk_tokens).total.backward(), torch.device("cpu")
        )

    buffer_bytes = 4 * num_tokens * vocab
    unchunked = peak(num_tokens)
    assert unchunked > buffer_bytes, "the measurement sees the logits"
    assert unchunked < 3.2 * buffer_bytes
    assert peak(num_tokens // 4) <= 0.4 * unchunked
    assert peak(num_tokens // 16) <= 0.12 * unchunked


def test_benchmark_reports_time_and_memory_of_every_variant() -> None:
    case = benchmark.KlCase("tiny", 1024, 512, 8, 12, torch.float32)
    rows = {str(row["variant"]): row for row in benchmark.measure(case, 1, torch.device("cpu"))}
    chunks = ["256 tokens", "64 tokens"]
    assert set(rows) == {"unchunked", *chunks, *(f"{chunk}, in main_grad" for chunk in chunks), "plain"}
    ratio = rows["256 tokens"]["memory_ratio"]
    assert isinstance(ratio, float) and ratio <= 0.4
    assert all(isinstance(row["time_ms"], float) and row["time_ms"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens = 0: must be at least 1"),
        ({"temperature": 0.0}, "temperature = 0.0: must be"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"kl_weight": -1.0}, "kl_weight = -1.0"),
        ({"cross_entropy_weight": float("inf")}, "cross_entropy_weight = inf"),
        ({"labels": None, "cross_entropy_weight": 0.5}, "labels: missing, but cross_entropy_weight = 0.5"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels: shape \(5,\) must be \(6,\)"),
        ({"labels": torch.zeros(6)}, "labels: dtype torch.float32"),
        ({"token_weights": torch.ones(6, 1)}, r"token_weights: shape \(6, 1\) must be \(6,\)"),
        ({"teacher_hidden": None, "teacher_head": None}, "teacher_hidden: missing, but kl_weight = 1.0"),
        ({"teacher_head": None}, "one of them is missing"),
        ({"teacher_hidden": torch.zeros(5, 4)}, r"teacher_hidden: shape \(5, 4\) must be \(6, 4\)"),
        ({"teacher_head": torch.zeros(8, 4)}, r"teacher_head: shape \(8, 4\) must be \(9, 4\)"),
        ({"student_head": torch.zeros(9, 5)}, "student_head: width 5 must equal student_hidden's, 3"),
        ({"student_head": torch.zeros(9, 3).bfloat16()}, "student_head: dtype torch.bfloat16"),
        ({"head_gradient": torch.zeros(8, 3)}, r"head_gradient: shape \(8, 3\) must be \(9, 3\)"),
        ({"head_gradient": torch.zeros(9, 3).double()}, "head_gradient: dtype torch.float64 must be torch.float32"),
        ({"student_hidden": torch.zeros(2, 3, 3)}, "student_hidden: shape .* must have 2 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "student_hidden": torch.zeros(6, 3),
        "student_head": torch.zeros(9, 3),
        "teacher_hidden": torch.zeros(6, 4),
        "teacher_head": torch.zeros(9, 4),
        "labels": torch.zeros(6, dtype=torch.long),
        "token_weights": torch.ones(6),
        "kl_weight": 1.0,
        "cross_entropy_weight": 0.0,
        "temperature": 1.0,
        "chunk_tokens": 2048,
        "tp_group": None,
    }
    with pytest.raises(DistillationError, match=words):
        distillation_loss(**(arguments | change))  # type: ignore[arg-type]
