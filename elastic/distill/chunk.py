"""The loss of one chunk of tokens and its gradient with respect to the student's logits, in place.

n tokens of the chunk, v this rank's part of the vocabulary, w token weights, tau temperature, z the student's logits.
s = z / tau and t = teacher's logits / tau, both with their maximum taken away; q = softmax(s), p = softmax(t).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from elastic.distill.vocab_parallel import VocabShard


@dataclass(frozen=True)
class LossSettings:
    """Which terms a chunk computes and how they are weighted."""

    kl_weight: float
    cross_entropy_weight: float
    temperature: float
    with_cross_entropy: bool
    with_grad: bool
    shard: VocabShard


@dataclass(frozen=True)
class _Exponentials:
    """Unnormalised softmaxes [n, v] of this rank; `plain` is the student's at temperature 1, maybe the same tensor."""

    student: Tensor
    teacher: Tensor | None
    plain: Tensor


def fused_chunk_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    settings: LossSettings,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Do what `chunk_loss` does in two readings of the logits, bf16 or fp32, with Triton.

    The gradient is a difference of softmaxes taken in fp32 and only then rounded to `grad_dtype`; it takes the place of
    the student's logits if these have that dtype.
    """
    from elastic.kernels.softmax_pair import logit_gradient, row_statistics

    tau = 1.0 if teacher is None else settings.temperature
    mine = row_statistics(student, teacher, tau)
    maxima = settings.shard.reduce([mine.student_max, mine.teacher_max], ReduceOp.MAX)
    student_max, teacher_max = maxima if teacher is not None else (maxima[0], torch.zeros_like(maxima[0]))
    # Sums against the maxima of the whole vocabulary; the product's differences move along with them.
    student_grown, teacher_grown = (student_max - mine.student_max) / tau, (teacher_max - mine.teacher_max) / tau
    sums = {
        "student": mine.student_sum * (-student_grown).exp(),
        "plain": mine.plain_sum * (mine.student_max - student_max).exp(),
    }
    if teacher is not None:
        shrink = (-teacher_grown).exp()
        sums["teacher"] = mine.teacher_sum * shrink
        sums["product"] = (mine.product + mine.teacher_sum * (student_grown - teacher_grown)) * shrink
    columns = None  # of the labels; -1 on another rank
    if settings.with_cross_entropy and labels is not None:
        local, here = settings.shard.locate(labels)
        label_logit = student.gather(1, local.unsqueeze(1)).squeeze(1).float() - student_max
        sums["label_logit"], columns = label_logit.where(here, 0), local.where(here, -1)
    sums = dict(zip(sums, settings.shard.reduce(list(sums.values()), ReduceOp.SUM), strict=True))
    losses = _losses(sums, labels, weights, tau, settings)
    if not settings.with_grad:
        return losses, None
    kl_scale, plain_scale = weights * (settings.kl_weight * tau), weights * settings.cross_entropy_weight
    if teacher is None:
        kl_scale = torch.zeros_like(kl_scale)
    gradient = student if student.dtype == grad_dtype else torch.empty_like(student, dtype=grad_dtype)
    logit_gradient(
        student,
        teacher,
        student_max,
        teacher_max,
        (kl_scale / sums["student"], plain_scale / sums["plain"], kl_scale / sums.get("teacher", sums["student"])),
        torch.full_like(weights, -1, dtype=torch.int64) if columns is None else columns,
        plain_scale,
        tau,
        out=gradient,
    )
    return losses, gradient


def chunk_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    settings: LossSettings,
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted sums [KL, cross-entropy] over the chunk, fp64, not yet times their loss weights.

    With `settings.with_grad` also the gradient [n, v] of the weighted total in the logits' place and dtype:

        w (kl_weight tau (q - p) + cross_entropy_weight (softmax(z) - onehot(label)))

    Uses up both logits [n, v] as working memory; one more [n, v] is allocated.
    """
    tau = 1.0 if teacher is None else settings.temperature  # softens the KL only
    _take_maximum_away(student, teacher, settings.shard)
    label_logit = here = local = None
    if settings.with_cross_entropy and labels is not None:
        local, here = settings.shard.locate(labels)
        label_logit = student.gather(1, local.unsqueeze(1)).squeeze(1).where(here, 0)
    exponentials, sums = _exponentials(student, teacher, label_logit, tau, settings)
    losses = _losses(sums, labels, weights, tau, settings)
    if settings.with_grad:
        _make_gradient(exponentials, sums, weights, tau, settings)
        if settings.cross_entropy_weight > 0 and local is not None and here is not None:
            rows = torch.arange(len(local), device=local.device)
            student[rows, local] -= (settings.cross_entropy_weight * weights).where(here, 0)
        return losses, student
    return losses, None


def _take_maximum_away(student: Tensor, teacher: Tensor | None, shard: VocabShard) -> None:
    """Subtract each row's maximum over the whole vocabulary: every exponent is then <= 0, however large the logits."""
    logits = [student] if teacher is None else [student, teacher]
    maxima = shard.reduce([part.amax(-1) for part in logits], ReduceOp.MAX)
    for part, maximum in zip(logits, maxima, strict=True):
        part.sub_(maximum.unsqueeze(-1))


def _exponentials(
    student: Tensor, teacher: Tensor | None, label_logit: Tensor | None, tau: float, settings: LossSettings
) -> tuple[_Exponentials, dict[str, Tensor]]:
    """Turn shifted logits into exponentials, and their sums [n] over the whole vocabulary (one collective)."""
    sums = {} if label_logit is None else {"label_logit": label_logit}
    plain = student
    teacher_exp = None
    if tau != 1.0:
        student.div_(tau)
    if teacher is not None:
        if tau != 1.0:
            teacher.div_(tau)
        teacher_exp = teacher.exp()
        sums["teacher"] = teacher_exp.sum(-1)
        # t - s before anything is summed: exactly 0 where student and teacher agree, precise where they nearly do.
        sums["product"] = teacher.sub_(student).mul_(teacher_exp).sum(-1)
        if settings.with_cross_entropy and tau != 1.0:
            plain = torch.mul(student, tau, out=teacher).exp_()
            sums["plain"] = plain.sum(-1)
    sums["student"] = student.exp_().sum(-1)
    sums = dict(zip(sums, settings.shard.reduce(list(sums.values()), ReduceOp.SUM), strict=True))
    sums.setdefault("plain", sums["student"])
    return _Exponentials(student, teacher_exp, plain), sums


def _losses(
    sums: Mapping[str, Tensor], labels: Tensor | None, weights: Tensor, tau: float, settings: LossSettings
) -> Tensor:
    """Return the weighted sums [KL, cross-entropy] over the chunk's tokens."""
    losses = torch.zeros(2, dtype=torch.float64, device=weights.device)
    if "teacher" in sums:
        # sum p (log p - log q), with log p = t - log(sum exp t)
        kl = sums["product"] / sums["teacher"] + (sums["student"].log() - sums["teacher"].log())
        losses[0] = (tau**2 * kl * weights).sum(dtype=torch.float64)
    if settings.with_cross_entropy and labels is not None:
        cross_entropy = (sums["plain"].log() - sums["label_logit"]) * weights
        # Loud without waiting for the device; a label that weighs nothing (padding) may be anything.
        wrong = ((labels < 0) | (labels >= settings.shard.total)) & (weights != 0)
        losses[1] = cross_entropy.where(~wrong, torch.nan).sum(dtype=torch.float64)
    return losses


def _make_gradient(
    exponentials: _Exponentials, sums: Mapping[str, Tensor], weights: Tensor, tau: float, settings: LossSettings
) -> None:
    """Overwrite the student's exponentials with the gradient, all but the label's -1."""
    student = exponentials.student
    kl_scale = weights * (settings.kl_weight * tau)
    plain_scale = weights * settings.cross_entropy_weight / sums["plain"]
    student_scale = kl_scale / sums["student"]
    if exponentials.plain is student:
        student_scale += plain_scale
    student.mul_(student_scale.unsqueeze(-1))
    if exponentials.teacher is not None and settings.kl_weight > 0:
        # Scaled and subtracted in two steps: a fused one rounds once, and q - p would not be 0 for equal logits.
        student.sub_(exponentials.teacher.mul_((kl_scale / sums["teacher"]).unsqueeze(-1)))
    if exponentials.plain is not student and settings.cross_entropy_weight > 0:
        student.add_(exponentials.plain.mul_(plain_scale.unsqueeze(-1)))
