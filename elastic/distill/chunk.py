"""The loss of one chunk of tokens and its gradient with respect to the student's logits, in place.

n tokens of the chunk, V vocabulary, v this rank's part of it, w token weights, tau temperature, z the student's logits.
s = z / tau and t = teacher's logits / tau, both with their maximum taken away; q = softmax(s), p = softmax(t).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp


@dataclass(frozen=True)
class VocabShard:
    """Ids [start, start + size) of `total`: a rank's part; equal parts in rank order, as Megatron-Core deals them."""

    start: int
    size: int
    total: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, size: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """Describe this rank's part, given its number of rows."""
        num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        return cls(rank * size, size, num_ranks * size, group if num_ranks > 1 else None)

    def reduce(self, rows: dict[str, Tensor], op: dist.ReduceOp.RedOpType) -> dict[str, Tensor]:
        """Combine [n] tensors over the ranks with a single collective."""
        if self.group is None:
            return rows
        stacked = torch.stack(list(rows.values()))
        dist.all_reduce(stacked, op=op, group=self.group)
        return dict(zip(rows, stacked.unbind(), strict=True))

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return global ids [n] as local rows (0 where another rank has them) and whether they are here."""
        local = labels.long() - self.start
        here = (local >= 0) & (local < self.size)
        return local.where(here, 0), here


@dataclass(frozen=True)
class LossSettings:
    """How a chunk's terms are weighted, its temperature (1 without a teacher), and whether gradients are wanted.

    Token i of a chunk is of row i mod `num_rows`; a chunk holds whole rounds of them.
    """

    kl_weight: float
    cross_entropy_weight: float
    temperature: float
    with_grad: bool
    shard: VocabShard
    num_rows: int = 1


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

    tau, mine = settings.temperature, row_statistics(student, teacher, settings.temperature)
    maxima = settings.shard.reduce({"student": mine.student_max, "teacher": mine.teacher_max}, ReduceOp.MAX)
    # Sums against the maxima of the whole vocabulary; the product's differences move along with them.
    student_grown = (maxima["student"] - mine.student_max) / tau
    sums = {
        "student": mine.student_sum * (-student_grown).exp(),
        "plain": mine.plain_sum * (mine.student_max - maxima["student"]).exp(),
    }
    if teacher is not None:
        teacher_grown = (maxima["teacher"] - mine.teacher_max) / tau
        shrink = (-teacher_grown).exp()
        sums["teacher"] = mine.teacher_sum * shrink
        sums["product"] = (mine.product + mine.teacher_sum * (student_grown - teacher_grown)) * shrink
    columns = torch.full_like(weights, -1, dtype=torch.int64)  # of the labels; -1 on another rank
    if labels is not None:
        local, here = settings.shard.locate(labels)
        label_logit = student.gather(1, local.unsqueeze(1)).squeeze(1).float() - maxima["student"]
        sums["label_logit"], columns = label_logit.where(here, 0), local.where(here, -1)
    sums = settings.shard.reduce(sums, ReduceOp.SUM)
    losses = _losses(sums, labels, weights, settings)
    if not settings.with_grad:
        return losses, None
    kl_scale, plain_scale = weights * (settings.kl_weight * tau), weights * settings.cross_entropy_weight
    gradient = student if student.dtype == grad_dtype else torch.empty_like(student, dtype=grad_dtype)
    scales = kl_scale / sums["student"], plain_scale / sums["plain"], kl_scale / sums.get("teacher", sums["student"])
    tops = maxima["student"], maxima["teacher"]
    logit_gradient(student, teacher, *tops, scales, columns, plain_scale, tau, out=gradient)
    return losses, gradient


def chunk_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, weights: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted sums [2, rows] of KL and cross-entropy over the chunk, fp64, not yet times their weights.

    Without a teacher or labels a sum is 0. With `settings.with_grad` also the gradient [n, v] of the weighted total
    in the logits' place and dtype:

        w (kl_weight tau (q - p) + cross_entropy_weight (softmax(z) - onehot(label)))

    Uses up both logits [n, v] as working memory; one more [n, v] is allocated.
    """
    tau, sums = settings.temperature, dict[str, Tensor]()
    logits = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    # Less each row's maximum over the whole vocabulary: every exponent is then <= 0, however large the logits.
    maxima = settings.shard.reduce({name: part.amax(-1) for name, part in logits.items()}, ReduceOp.MAX)
    for name, part in logits.items():
        part.sub_(maxima[name].unsqueeze(-1))
    if labels is not None:
        local, here = settings.shard.locate(labels)
        sums["label_logit"] = student.gather(1, local.unsqueeze(1)).squeeze(1).where(here, 0)
    if tau != 1.0:
        for part in logits.values():
            part.div_(tau)
    plain = student  # exponentials at temperature 1
    if teacher is not None:
        teacher_exp = teacher.exp()
        sums["teacher"] = teacher_exp.sum(-1)
        # t - s before anything is summed: exactly 0 where student and teacher agree, precise where they nearly do.
        sums["product"] = teacher.sub_(student).mul_(teacher_exp).sum(-1)
        if labels is not None and tau != 1.0:
            plain = torch.mul(student, tau, out=teacher).exp_()
            sums["plain"] = plain.sum(-1)
    sums["student"] = student.exp_().sum(-1)
    sums = settings.shard.reduce(sums, ReduceOp.SUM)
    sums.setdefault("plain", sums["student"])
    losses = _losses(sums, labels, weights, settings)
    if not settings.with_grad:
        return losses, None
    kl_scale, label_scale = weights * (settings.kl_weight * tau), weights * settings.cross_entropy_weight
    student_scale, plain_scale = kl_scale / sums["student"], label_scale / sums["plain"]
    student.mul_((student_scale + plain_scale if plain is student else student_scale).unsqueeze(-1))
    if teacher is not None and settings.kl_weight > 0:
        # Scaled and subtracted in two steps: a fused one rounds once, and q - p would not be 0 for equal logits.
        student.sub_(teacher_exp.mul_((kl_scale / sums["teacher"]).unsqueeze(-1)))
    if plain is not student and settings.cross_entropy_weight > 0:
        student.add_(plain.mul_(plain_scale.unsqueeze(-1)))
    if labels is not None and settings.cross_entropy_weight > 0:
        student[torch.arange(len(local), device=local.device), local] -= label_scale.where(here, 0)
    return losses, student


def _losses(sums: Mapping[str, Tensor], labels: Tensor | None, weights: Tensor, settings: LossSettings) -> Tensor:
    """Return the weighted sums [2, rows] of KL and cross-entropy over the chunk's tokens."""
    rows = (-1, settings.num_rows)
    losses = torch.zeros(2, settings.num_rows, dtype=torch.float64, device=weights.device)
    if "teacher" in sums:
        # sum p (log p - log q), with log p = t - log(sum exp t)
        kl = sums["product"] / sums["teacher"] + (sums["student"].log() - sums["teacher"].log())
        losses[0] = (settings.temperature**2 * kl * weights).view(rows).sum(0, dtype=torch.float64)
    if labels is not None:
        cross_entropy = (sums["plain"].log() - sums["label_logit"]) * weights
        # Loud without waiting for the device; a label that weighs nothing (padding) may be anything.
        wrong = ((labels < 0) | (labels >= settings.shard.total)) & (weights != 0)
        losses[1] = cross_entropy.where(~wrong, torch.nan).view(rows).sum(0, dtype=torch.float64)
    return losses
