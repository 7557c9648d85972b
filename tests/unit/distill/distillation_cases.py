"""Random inputs of the distillation loss, and what its definition gives in fp64."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.distill.kl import LossTerms, distillation_loss


@dataclass(frozen=True)
class Case:
    """Inputs of one call: hidden states [N, d] and [N, D], heads [V, d] and [V, D], labels [N], token weights [N]."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    token_weights: Tensor | None

    @classmethod
    def draw(
        cls,
        num_tokens: int,
        vocab: int,
        width: int,
        teacher_width: int,
        dtype: torch.dtype = torch.float32,
        weighted: bool = True,
        scale: float = 1.0,
    ) -> "Case":
        """Draw random inputs with logits of about `scale`; every third token weighs nothing."""
        generator = torch.Generator().manual_seed(num_tokens * vocab + width)

        def normal(rows: int, columns: int, size: float) -> Tensor:
            return (size * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)

        weights = torch.rand(num_tokens, generator=generator) * (torch.arange(num_tokens) % 3 != 2)
        return cls(
            normal(num_tokens, width, scale),
            normal(vocab, width, width**-0.5),
            normal(num_tokens, teacher_width, scale),
            normal(vocab, teacher_width, teacher_width**-0.5),
            torch.randint(vocab, (num_tokens,), generator=generator),
            weights if weighted else None,
        )

    def leaves(self) -> "Case":
        """Return a copy whose student tensors collect gradients."""
        return replace(
            self,
            student_hidden=self.student_hidden.detach().clone().requires_grad_(),
            student_head=self.student_head.detach().clone().requires_grad_(),
        )


def loss_of(
    case: Case,
    kl_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    report_cross_entropy: bool = False,
    head_gradient: Tensor | None = None,
) -> LossTerms:
    return distillation_loss(
        case.student_hidden,
        case.student_head,
        case.teacher_hidden,
        case.teacher_head,
        case.labels,
        case.token_weights,
        kl_weight=kl_weight,
        cross_entropy_weight=cross_entropy_weight,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        tp_group=None,
        report_cross_entropy=report_cross_entropy,
        head_gradient=head_gradient,
    )


@dataclass(frozen=True)
class Reference:
    """What the definition gives in fp64, all tokens at once."""

    total: Tensor
    kl: Tensor
    cross_entropy: Tensor
    hidden_grad: Tensor
    head_grad: Tensor

    @classmethod
    def of(cls, case: Case, kl_weight: float, cross_entropy_weight: float, temperature: float) -> "Reference":
        hidden = case.student_hidden.detach().double().requires_grad_()
        head = case.student_head.detach().double().requires_grad_()
        student = hidden @ head.t()
        teacher = case.teacher_hidden.double() @ case.teacher_head.double().t()
        weights = torch.ones(len(hidden)) if case.token_weights is None else case.token_weights
        log_p = torch.log_softmax(teacher / temperature, dim=-1)
        log_q = torch.log_softmax(student / temperature, dim=-1)
        kl = (weights.double() * temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
        label_log = torch.log_softmax(student, dim=-1)[torch.arange(len(hidden)), case.labels]
        cross_entropy = -(weights.double() * label_log).sum()
        total = kl_weight * kl + cross_entropy_weight * cross_entropy
        hidden_grad, head_grad = torch.autograd.grad(total, (hidden, head))
        return cls(total.detach(), kl.detach(), cross_entropy.detach(), hidden_grad, head_grad)


def relative_error(actual: Tensor | None, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|, in the norm over all elements."""
    assert actual is not None
    return float((actual.double() - expected).norm() / expected.norm())
