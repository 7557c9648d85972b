"""Chunked against unchunked distillation loss, forward and backward: time and peak memory.

Called by `recipes/benchmark.py`. The variants take turns within one run, so that a busy machine slows all of them, and
the ratios are medians of ratios within a turn. `in main_grad` sums the head's gradient where Megatron-Core keeps it.
`plain` is what one writes without this module: full logits of teacher and student and `log_softmax` under autograd.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from elastic.distill.kl import distillation_loss
from recipes.benchmarks.memory import peak_extra_bytes

CHUNK_TOKENS = (256, 64)
BASELINE = "unchunked"


@dataclass(frozen=True)
class KlCase:
    """One size: the head of a model of about `name` parameters, the student at 70% of the teacher's width."""

    name: str
    num_tokens: int
    vocab: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype


CASES = tuple(
    KlCase(name, 1024, 8192, student, teacher, dtype)
    for name, student, teacher in (("5M", 176, 256), ("25M", 352, 512))
    for dtype in (torch.float32, torch.bfloat16)
)


@dataclass(frozen=True)
class _Tensors:
    """Inputs of one case; hidden states [N, D], heads [V, D]."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @classmethod
    def of(cls, case: KlCase, device: torch.device) -> "_Tensors":
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, width: int, scale: float) -> Tensor:
            return (scale * torch.randn(rows, width, generator=generator)).to(device, case.dtype)

        return cls(
            draw(case.num_tokens, case.student_width, 1.0).requires_grad_(),
            draw(case.vocab, case.student_width, case.student_width**-0.5).requires_grad_(),
            draw(case.num_tokens, case.teacher_width, 1.0),
            draw(case.vocab, case.teacher_width, case.teacher_width**-0.5),
        )


def _chunked(tensors: _Tensors, chunk_tokens: int, head_gradient: Tensor | None = None) -> None:
    distillation_loss(
        tensors.student_hidden,
        tensors.student_head,
        tensors.teacher_hidden,
        tensors.teacher_head,
        None,
        None,
        kl_weight=1.0,
        cross_entropy_weight=0.0,
        temperature=1.0,
        chunk_tokens=chunk_tokens,
        tp_group=None,
        head_gradient=head_gradient,
    ).total.backward()


def _plain(tensors: _Tensors) -> None:
    student = (tensors.student_hidden @ tensors.student_head.t()).float().log_softmax(-1)
    with torch.no_grad():
        teacher = (tensors.teacher_hidden @ tensors.teacher_head.t()).float().log_softmax(-1)
    (teacher.exp() * (teacher - student)).sum().backward()


def _forget(tensors: _Tensors) -> None:
    tensors.student_hidden.grad = tensors.student_head.grad = None


def _time_ms(variant: Callable[[], None], tensors: _Tensors, device: torch.device) -> float:
    """Return the wall time of one forward and backward pass."""
    _forget(tensors)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    variant()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def measure(case: KlCase, num_turns: int, device: torch.device) -> list[dict[str, object]]:
    """Return one row per variant of a case, with ratios to the unchunked loss."""
    tensors = _Tensors.of(case, device)
    main_grad = torch.zeros_like(tensors.student_head, dtype=torch.float32)
    variants: dict[str, Callable[[], None]] = {
        BASELINE: partial(_chunked, tensors, case.num_tokens),
        **{f"{size} tokens": partial(_chunked, tensors, size) for size in CHUNK_TOKENS},
        **{f"{size} tokens, in main_grad": partial(_chunked, tensors, size, main_grad) for size in CHUNK_TOKENS},
        "plain": partial(_plain, tensors),
    }
    peaks: dict[str, int] = {}
    for name, variant in variants.items():  # also the warm-up
        variant()
        _forget(tensors)
        peaks[name] = peak_extra_bytes(variant, device)
    turns = [{name: _time_ms(variant, tensors, device) for name, variant in variants.items()} for _ in range(num_turns)]
    return [
        {
            "benchmark": "kl",
            "size": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "variant": name,
            "tokens": case.num_tokens,
            "vocab": case.vocab,
            "time_ms": statistics.median(turn[name] for turn in turns),
            "time_ratio": statistics.median(turn[name] / turn[BASELINE] for turn in turns),
            "peak_mib": peaks[name] / 2**20,
            "memory_ratio": peaks[name] / peaks[BASELINE],
        }
        for name in variants
    ]


def run(
    num_turns: int, precisions: Sequence[torch.dtype], device: torch.device | None = None
) -> list[dict[str, object]]:
    """Measure every case in one of `precisions` and return one row per variant."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [row for case in CASES if case.dtype in precisions for row in measure(case, num_turns, device)]
