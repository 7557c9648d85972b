"""Two softmaxes over the same row, student's and teacher's: their statistics in one reading, a gradient in a second.

n rows (tokens), v columns (this rank's part of the vocabulary), z and y the student's and teacher's logits, tau the
temperature, s = (z - max z) / tau, t = (y - max y) / tau. Logits are bf16, fp16 or fp32; everything else is fp32.
Imported only where Triton runs, on a GPU or in its interpreter; the twin in plain PyTorch is in `distill/chunk.py`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096


@dataclass(frozen=True)
class RowStatistics:
    """What a row's softmaxes need, fp32 [n] each, over the columns of this rank.

    student_max = max z, student_sum = sum exp(s), plain_sum = sum exp(z - max z) at temperature 1, and with a teacher
    teacher_max = max y, teacher_sum = sum exp(t) and product = sum exp(t) (t - s).
    """

    student_max: Tensor
    student_sum: Tensor
    plain_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    product: Tensor


@triton.jit
def statistics_kernel(
    student,
    teacher,
    out,
    num_rows,
    num_columns,
    student_stride,
    teacher_stride,
    tau,
    HAS_TEACHER: tl.constexpr,
    IS_SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program reads one row once, with running maxima: sums taken so far are rescaled when a maximum grows."""
    row = tl.program_id(0).to(tl.int64)
    student_max = float("-inf")
    teacher_max = float("-inf")
    student_sum = 0.0
    plain_sum = 0.0
    teacher_sum = 0.0
    product = 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(student + row * student_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
        student_new = tl.maximum(student_max, tl.max(z, axis=0))
        s = (z - student_new) / tau if IS_SOFT else z - student_new
        student_grown = (student_new - student_max) / tau if IS_SOFT else student_new - student_max
        student_sum = student_sum * tl.exp(-student_grown) + tl.sum(tl.exp(s), axis=0)
        if IS_SOFT:
            shrink = tl.exp(student_max - student_new)
            plain_sum = plain_sum * shrink + tl.sum(tl.exp(z - student_new), axis=0)
        if HAS_TEACHER:
            y = tl.load(teacher + row * teacher_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
            teacher_new = tl.maximum(teacher_max, tl.max(y, axis=0))
            t = (y - teacher_new) / tau if IS_SOFT else y - teacher_new
            teacher_grown = (teacher_new - teacher_max) / tau if IS_SOFT else teacher_new - teacher_max
            shrink = tl.exp(-teacher_grown)
            exponential = tl.exp(t)
            teacher_before = teacher_sum
            teacher_sum = teacher_sum * shrink + tl.sum(exponential, axis=0)
            # The difference before anything is summed: exactly 0 where student and teacher agree, and a constant added
            # to either costs no digits. What was summed against smaller maxima moves along with them.
            grown = tl.where(start == 0, 0.0, student_grown - teacher_grown)
            product = (product + teacher_before * grown) * shrink
            product += tl.sum(exponential * tl.where(inside, t - s, 0.0), axis=0)
            teacher_max = teacher_new
        student_max = student_new
    tl.store(out + row, student_max)
    tl.store(out + num_rows + row, student_sum)
    tl.store(out + 2 * num_rows + row, plain_sum if IS_SOFT else student_sum)
    tl.store(out + 3 * num_rows + row, teacher_max)
    tl.store(out + 4 * num_rows + row, teacher_sum)
    tl.store(out + 5 * num_rows + row, product)


@triton.jit
def gradient_kernel(
    student,
    teacher,
    gradient,
    student_max,
    teacher_max,
    student_scale,
    plain_scale,
    teacher_scale,
    label,
    label_scale,
    num_columns,
    student_stride,
    teacher_stride,
    gradient_stride,
    tau,
    HAS_TEACHER: tl.constexpr,
    IS_SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK columns of one row; `gradient` may be `student` itself."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    z = tl.load(student + row * student_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.load(student_max + row)
    if IS_SOFT:
        value = tl.exp((z - top) / tau) * tl.load(student_scale + row)
        value += tl.exp(z - top) * tl.load(plain_scale + row)
    else:
        value = tl.exp(z - top) * (tl.load(student_scale + row) + tl.load(plain_scale + row))
    if HAS_TEACHER:
        y = tl.load(teacher + row * teacher_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
        t = y - tl.load(teacher_max + row)
        if IS_SOFT:
            t /= tau
        value -= tl.exp(t) * tl.load(teacher_scale + row)
    value -= tl.where(columns == tl.load(label + row), tl.load(label_scale + row), 0.0)
    tl.store(gradient + row * gradient_stride + columns, value.to(gradient.dtype.element_ty), mask=inside)


def row_statistics(student: Tensor, teacher: Tensor | None, tau: float) -> RowStatistics:
    """Return the statistics of logits [n, v]; a missing teacher's are -inf, 0 and 0. Rows may be rows of wider ones."""
    num_rows, num_columns = _shape(student, teacher)
    out = torch.empty(6, num_rows, dtype=torch.float32, device=student.device)
    statistics_kernel[(num_rows,)](
        student,
        student if teacher is None else teacher,
        out,
        num_rows,
        num_columns,
        student.stride(0),
        student.stride(0) if teacher is None else teacher.stride(0),
        tau,
        HAS_TEACHER=teacher is not None,
        IS_SOFT=tau != 1.0,
        BLOCK=_block(num_columns),
        num_warps=8,
    )
    return RowStatistics(*out.unbind())


def logit_gradient(
    student: Tensor,
    teacher: Tensor | None,
    student_max: Tensor,
    teacher_max: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    label: Tensor,
    label_scale: Tensor,
    tau: float,
    out: Tensor,
) -> None:
    """Write a exp(s) + b exp(z - max z) - c exp(t) - d [column is label] into `out` [n, v].

    scales = (a, b, c) and label_scale = d are fp32 [n]; label [n] are columns, -1 where the label lies on another rank.
    """
    num_rows, num_columns = _shape(student, teacher)
    block = _block(num_columns)
    gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
        student,
        student if teacher is None else teacher,
        out,
        student_max,
        teacher_max,
        *scales,
        label,
        label_scale,
        num_columns,
        student.stride(0),
        student.stride(0) if teacher is None else teacher.stride(0),
        out.stride(0),
        tau,
        HAS_TEACHER=teacher is not None,
        IS_SOFT=tau != 1.0,
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=False,  # a fused product and difference rounds once, and q - p would not be 0 for equal logits
    )


def _shape(student: Tensor, teacher: Tensor | None) -> tuple[int, int]:
    assert student.dim() == 2 and student.stride(1) == 1 and student.dtype != torch.float64
    assert teacher is None or (teacher.shape == student.shape and teacher.stride(1) == 1)
    return student.shape[0], student.shape[1]


def _block(num_columns: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(num_columns))
