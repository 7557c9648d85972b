"""Distillation loss from hidden states: chunked, vocab-parallel, its gradients computed on the way.

    KL(teacher || student) = sum_i p_i (log p_i - log q_i),   p = softmax(teacher / tau), q = softmax(student / tau)

N tokens, n of them in a chunk, d / D student's and teacher's hidden width, v this rank's part of the vocabulary.
Full logits [N, V] never exist: a chunk makes its [n, v] logits, turns them in place into the gradient of the loss with
respect to the student's logits (`chunk.py`), multiplies that into the gradients of hidden states and head, and is gone.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic.distill.chunk import LossSettings, VocabShard, chunk_loss, fused_chunk_loss
from elastic.kernels.products import add_product, product


class DistillationError(ValueError):
    """A loss asked for with settings or tensors that do not fit together."""


@dataclass(frozen=True)
class LossTerms:
    """Sums over tokens: fp32 scalars (fp64 for fp64 inputs), equal on all ranks of the tensor-parallel group.

    `total` = kl_weight * kl + cross_entropy_weight * cross_entropy carries the gradient. `kl` (with its tau^2; None
    without a teacher) and `cross_entropy` (None unless weighted or asked for) are detached, and so is `by_row`, fp64
    [2, rows]: both again, over the tokens of each row; 0 where there is none.
    """

    total: Tensor
    kl: Tensor | None
    cross_entropy: Tensor | None
    by_row: Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    *,
    kl_weight: float,
    cross_entropy_weight: float,
    temperature: float,
    chunk_tokens: int,
    tp_group: dist.ProcessGroup | None,
    report_cross_entropy: bool = False,
    head_gradient: Tensor | None = None,
    num_rows: int = 1,
) -> LossTerms:
    """Sum kl_weight * tau^2 * KL(teacher || student) + cross_entropy_weight * CE over weighted tokens (eq. 14, 16).

    student_hidden [N, d], student_head [v, d], teacher_hidden [N, D], teacher_head [v, D] (this rank's rows of the
    vocabulary), labels [N] global ids, token_weights [N] (1 where None). Matrix products run in the inputs' dtype, all
    else in fp32 (fp64 for fp64 inputs). The temperature softens the KL only, never the cross-entropy. A label outside
    the vocabulary makes the loss NaN unless its token weighs 0.

    Token i is of row i mod `num_rows`, a divisor of N: rows of a batch [rows, s] that is flattened from [s, rows].

    `chunk_tokens` bounds memory: three buffers [chunk_tokens, v] at a time. Gradients are ready when this returns, the
    backward pass only scales them; they are not computed where none are wanted. Teacher and token weights get none.

    With `head_gradient` [v, d], fp32 (fp64 for fp64 inputs) like Megatron-Core's `main_grad` or columns of it, the
    gradient of `total` for the head is added to it before this returns, and autograd gets none for the head: nothing of
    the head's size is allocated. It cannot be scaled afterwards, so `total` must be differentiated as it is, once: an
    incoming gradient other than 1 makes that of student_hidden NaN, loud without waiting for the device.

    With `tp_group` the gradient of student_hidden is this rank's PARTIAL sum over its part of the vocabulary: pass the
    hidden states through elastic.model.forward.parallel_hidden, whose backward adds the ranks up. The head's is whole.

    Raises DistillationError for shapes, dtypes or settings that do not fit.
    """
    _check_settings(kl_weight, cross_entropy_weight, temperature, chunk_tokens)
    if (teacher_hidden is None) != (teacher_head is None):
        raise DistillationError("teacher_hidden and teacher_head: one of them is missing; give both or neither")
    teacher = None if teacher_hidden is None or teacher_head is None else (teacher_hidden, teacher_head)
    _check_tensors((student_hidden, student_head), teacher, labels, token_weights, head_gradient)
    if kl_weight > 0 and teacher is None:
        raise DistillationError(f"teacher_hidden: missing, but kl_weight = {kl_weight} needs it; give it, or weight 0")
    if cross_entropy_weight > 0 and labels is None:
        raise DistillationError(
            f"labels: missing, but cross_entropy_weight = {cross_entropy_weight} needs them; give them, or weight 0"
        )
    if cross_entropy_weight == 0 and not report_cross_entropy:
        labels = None
    settings = LossSettings(
        kl_weight=kl_weight,
        cross_entropy_weight=cross_entropy_weight,
        temperature=1.0 if teacher is None else temperature,
        with_grad=torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad),
        shard=VocabShard.of(student_head.shape[0], tp_group),
        num_rows=num_rows,
    )
    chunk_tokens = max(1, chunk_tokens // num_rows) * num_rows
    total, kl, cross_entropy, by_row = _ChunkedLoss.apply(
        student_hidden, student_head, teacher, labels, token_weights, settings, chunk_tokens, head_gradient
    )
    return LossTerms(total, None if teacher is None else kl, None if labels is None else cross_entropy, by_row)


class _ChunkedLoss(torch.autograd.Function):
    """Sums the loss chunk by chunk and keeps gradients instead of logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        labels: Tensor | None,
        token_weights: Tensor | None,
        settings: LossSettings,
        chunk_tokens: int,
        head_gradient: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_tokens = student_hidden.shape[0]
        dtype = _sum_dtype(student_hidden)
        weights = student_hidden.new_ones(num_tokens, dtype=dtype) if token_weights is None else token_weights.to(dtype)
        hidden_grad = head_grad = None
        if settings.with_grad and ctx.needs_input_grad[0]:
            hidden_grad = torch.empty_like(student_hidden, memory_format=torch.contiguous_format)
        if settings.with_grad and ctx.needs_input_grad[1]:
            head_grad = head_gradient
            if head_grad is None:
                head_grad = torch.zeros(student_head.shape, dtype=dtype, device=student_head.device)
        by_row = torch.zeros(2, settings.num_rows, dtype=torch.float64, device=student_hidden.device)
        of_chunk = chunk_loss
        if student_hidden.is_cuda and dtype == torch.float32:
            of_chunk = partial(fused_chunk_loss, grad_dtype=student_hidden.dtype)
        for start in range(0, num_tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden = student_hidden[chunk]
            logits = product(hidden, student_head.t(), dtype)
            teacher_logits = None if teacher is None else product(teacher[0][chunk], teacher[1].t(), dtype)
            labels_here = None if labels is None else labels[chunk]
            losses, gradient = of_chunk(logits, teacher_logits, labels_here, weights[chunk], settings)
            by_row += losses
            del logits, teacher_logits  # spent, and the products may need room
            if gradient is None:
                continue
            gradient = gradient.to(hidden.dtype)
            if hidden_grad is not None:
                # In fp32 first: a long sum over the vocabulary is split, and its parts would be rounded to bf16.
                hidden_grad[chunk] = product(gradient, student_head, dtype)
            if head_grad is not None:
                add_product(head_grad, gradient.t(), hidden)
        # Where the caller's buffer has it, autograd must not see it again.
        ctx.save_for_backward(hidden_grad, None if head_gradient is not None else head_grad)
        ctx.dtypes = student_hidden.dtype, student_head.dtype
        ctx.unscaled = head_grad is not None and head_grad is head_gradient
        sums = by_row.sum(1)
        total = settings.kl_weight * sums[0] + settings.cross_entropy_weight * sums[1]
        kl, cross_entropy = sums.to(dtype).unbind()
        ctx.mark_non_differentiable(kl, cross_entropy, by_row)
        return total.to(dtype), kl, cross_entropy, by_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_reported: Tensor) -> tuple[Tensor | None, ...]:
        # New tensors, never the saved ones: Megatron-Core's mappings reduce a gradient in place. `grad` as [1], not as
        # a scalar, so that it is not rounded to bf16 before the product.
        if ctx.unscaled:
            grad = grad.where(grad == 1, torch.nan)
        scaled = (
            None if saved is None else torch.mul(saved, grad.reshape(1), out=torch.empty_like(saved, dtype=dtype))
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None, None


def _sum_dtype(inputs: Tensor) -> torch.dtype:
    """Return the dtype in which logits and sums over `inputs` are held."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def _check_settings(kl_weight: float, cross_entropy_weight: float, temperature: float, chunk_tokens: int) -> None:
    """Raise DistillationError for numbers out of range."""
    for name, weight in (("kl_weight", kl_weight), ("cross_entropy_weight", cross_entropy_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise DistillationError(f"{name} = {weight}: must be a finite number, at least 0")
    if not (math.isfinite(temperature) and temperature > 0):
        raise DistillationError(f"temperature = {temperature}: must be a finite number above 0; 1 leaves logits alone")
    if chunk_tokens < 1:
        raise DistillationError(f"chunk_tokens = {chunk_tokens}: must be at least 1; 2048 keeps matrix products large")


def _check_tensors(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    head_gradient: Tensor | None,
) -> None:
    """Raise DistillationError unless shapes and dtypes of (hidden states, head), labels, weights and sums agree."""
    _check_pair("student", *student)
    num_tokens, vocab = len(student[0]), len(student[1])
    expected: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        ("labels", labels, (num_tokens,), "one id per token of student_hidden"),
        ("token_weights", token_weights, (num_tokens,), "one weight per token of student_hidden"),
        ("head_gradient", head_gradient, tuple(student[1].shape), "student_head's"),
    ]
    if teacher is not None:
        _check_pair("teacher", *teacher)
        width = teacher[0].shape[1]
        expected.append(("teacher_hidden", teacher[0], (num_tokens, width), "student_hidden's tokens"))
        expected.append(("teacher_head", teacher[1], (vocab, width), "student_head's vocabulary rows"))
    for name, tensor, shape, rule in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise DistillationError(f"{name}: shape {tuple(tensor.shape)} must be {shape}: {rule}")
    if labels is not None and labels.dtype not in (torch.int64, torch.int32):
        raise DistillationError(f"labels: dtype {labels.dtype} must be an integer one; convert with .long()")
    if head_gradient is not None and head_gradient.dtype != (dtype := _sum_dtype(student[0])):
        raise DistillationError(f"head_gradient: dtype {head_gradient.dtype} must be {dtype}, that of the sums")


def _check_pair(role: str, hidden: Tensor, head: Tensor) -> None:
    """Raise DistillationError unless hidden [N, D] and head [v, D] multiply."""
    for name, tensor in ((f"{role}_hidden", hidden), (f"{role}_head", head)):
        if tensor.dim() != 2:
            raise DistillationError(f"{name}: shape {tuple(tensor.shape)} must have 2 dimensions; flatten the others")
    if hidden.shape[1] != head.shape[1]:
        raise DistillationError(
            f"{role}_head: width {head.shape[1]} must equal {role}_hidden's, {hidden.shape[1]}; "
            "slice the head's columns to the width the hidden states were computed at"
        )
    if hidden.dtype != head.dtype:
        raise DistillationError(f"{role}_head: dtype {head.dtype} must equal {role}_hidden's, {hidden.dtype}")
