"""The distillation loss with the vocabulary split over two ranks, against the fp64 definition on one."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic.distill.chunk import LossSettings, VocabShard, chunk_loss, fused_chunk_loss
from elastic.distill.kl import distillation_loss
from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.forward import parallel_hidden
from tests.distributed.harness import run_distributed

S, B, WIDTH, TEACHER_WIDTH, VOCAB = 6, 3, 8, 12, 46


@dataclass(frozen=True)
class Case:
    """One combination of loss weights, temperature, chunks and sequence parallelism."""

    kl_weight: float
    cross_entropy_weight: float
    temperature: float
    chunk_tokens: int
    sequence_parallel: bool


CASES = [
    Case(kl_weight, cross_entropy_weight, temperature, chunk_tokens, sequence_parallel)
    for kl_weight, cross_entropy_weight in ((1.0, 0.0), (1.0, 0.3), (0.0, 1.0))
    for temperature in (1.0, 2.0)
    for chunk_tokens in (1, 5, 18)
    for sequence_parallel in (False, True)
]


@dataclass(frozen=True)
class Inputs:
    """Full tensors: hidden states [S, B, D], heads [V, D], labels and token weights [B, S]."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    token_weights: Tensor

    @classmethod
    def draw(cls) -> "Inputs":
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return cls(
            normal(S, B, WIDTH),
            normal(VOCAB, WIDTH),
            normal(S, B, TEACHER_WIDTH),
            normal(VOCAB, TEACHER_WIDTH),
            torch.randint(VOCAB, (B, S), generator=generator),
            (torch.rand(B, S, generator=generator) - 0.2).clamp(min=0),
        )


def _losses_and_gradients(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Run every case on this rank and return the loss terms and the gradients of the rank's own tensors."""
    use_cpu_backend()
    inputs, group, rank, size = Inputs.draw(), dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    vocab_part = slice(rank * VOCAB // size, (rank + 1) * VOCAB // size)
    results = []
    for case in cases:
        sequence_part = slice(rank * S // size, (rank + 1) * S // size) if case.sequence_parallel else slice(None)
        hidden = inputs.student_hidden[sequence_part].clone().requires_grad_()
        head = inputs.student_head[vocab_part].clone().requires_grad_()
        terms = distillation_loss(
            parallel_hidden(hidden, case.sequence_parallel, group),
            head,
            parallel_hidden(inputs.teacher_hidden[sequence_part], case.sequence_parallel, group),
            inputs.teacher_head[vocab_part],
            inputs.labels.t().reshape(-1),
            inputs.token_weights.t().reshape(-1),
            kl_weight=case.kl_weight,
            cross_entropy_weight=case.cross_entropy_weight,
            temperature=case.temperature,
            chunk_tokens=case.chunk_tokens,
            tp_group=group,
            report_cross_entropy=True,
        )
        (0.5 * terms.total).backward()
        assert terms.kl is not None and terms.cross_entropy is not None
        assert hidden.grad is not None and head.grad is not None
        results.append(
            {
                "total": terms.total.detach(),
                "kl": terms.kl,
                "cross_entropy": terms.cross_entropy,
                "hidden_grad": hidden.grad,
                "head_grad": head.grad,
            }
        )
    return results


def _definition(case: Case) -> dict[str, Tensor]:
    """Compute the same in fp64 with full logits [S, B, V] and plain autograd."""
    inputs = Inputs.draw()
    hidden = inputs.student_hidden.double().requires_grad_()
    head = inputs.student_head.double().requires_grad_()
    weights, labels = inputs.token_weights.double().t(), inputs.labels.t()
    student, teacher = hidden @ head.t(), inputs.teacher_hidden.double() @ inputs.teacher_head.double().t()
    log_q = torch.log_softmax(student / case.temperature, -1)
    log_p = torch.log_softmax(teacher / case.temperature, -1)
    kl = (weights * case.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
    label_log = torch.log_softmax(student, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    cross_entropy = -(weights * label_log).sum()
    total = case.kl_weight * kl + case.cross_entropy_weight * cross_entropy
    hidden_grad, head_grad = torch.autograd.grad(0.5 * total, (hidden, head))
    named = {"total": total, "kl": kl, "cross_entropy": cross_entropy}
    return {name: value.detach() for name, value in named.items()} | {
        "hidden_grad": hidden_grad,
        "head_grad": head_grad,
    }


@pytest.mark.parametrize("size", [1, 2])
def test_loss_and_gradients_equal_the_definition_at_every_tensor_parallel_size(size: int) -> None:
    ranks = run_distributed(_losses_and_gradients, size, CASES)
    for index, case in enumerate(CASES):
        expected = _definition(case)
        by_rank = [rank[index] for rank in ranks]
        for name in ("total", "kl", "cross_entropy"):
            for result in by_rank:
                torch.testing.assert_close(
                    result[name].double(), expected[name], rtol=1e-6, atol=0, msg=f"{case} {name}"
                )
                assert torch.equal(result[name], by_rank[0][name]), "all ranks hold the same number"
        heads = torch.cat([result["head_grad"] for result in by_rank])
        if case.sequence_parallel:
            hiddens = [torch.cat([result["hidden_grad"] for result in by_rank])]
        else:
            hiddens = [result["hidden_grad"] for result in by_rank]
        for actual, name in [(heads, "head_grad")] + [(hidden, "hidden_grad") for hidden in hiddens]:
            error = float((actual.double() - expected[name]).norm() / expected[name].norm())
            assert error < 1e-5, (case, name, error)


def _without_the_mapping() -> Tensor:
    inputs, group, rank = Inputs.draw(), dist.group.WORLD, dist.get_rank()
    hidden = inputs.student_hidden.flatten(0, 1).requires_grad_()
    rows = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    distillation_loss(
        hidden,
        inputs.student_head[rows],
        inputs.teacher_hidden.flatten(0, 1),
        inputs.teacher_head[rows],
        None,
        inputs.token_weights.t().reshape(-1),
        kl_weight=1.0,
        cross_entropy_weight=0.0,
        temperature=1.0,
        chunk_tokens=7,
        tp_group=group,
    ).total.backward()
    assert hidden.grad is not None
    return hidden.grad.view(S, B, WIDTH)


def test_without_the_mapping_each_rank_holds_a_partial_gradient() -> None:
    first, second = run_distributed(_without_the_mapping, 2)
    expected = 2 * _definition(Case(1.0, 0.0, 1.0, 18, False))["hidden_grad"]
    torch.testing.assert_close((first + second).double(), expected, rtol=1e-4, atol=1e-5)
    assert float((first.double() - expected).norm() / expected.norm()) > 0.1


def _collectives(chunk_tokens: int) -> list[int]:
    """Count this rank's collectives for a loss with and without cross-entropy."""
    inputs, group, rank = Inputs.draw(), dist.group.WORLD, dist.get_rank()
    rows = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    counts = []
    for cross_entropy_weight in (0.0, 0.3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            distillation_loss(
                inputs.student_hidden.flatten(0, 1),
                inputs.student_head[rows],
                inputs.teacher_hidden.flatten(0, 1),
                inputs.teacher_head[rows],
                inputs.labels.t().reshape(-1),
                None,
                kl_weight=1.0,
                cross_entropy_weight=cross_entropy_weight,
                temperature=2.0,
                chunk_tokens=chunk_tokens,
                tp_group=group,
            )
        counts.append(sum(event.count for event in profiler.key_averages() if event.key == "c10d::allreduce_"))
    return counts


def test_two_collectives_per_chunk() -> None:
    assert run_distributed(_collectives, 2, 6) == [[6, 6], [6, 6]]


def _fused_chunk():
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    generator = torch.Generator().manual_seed(3)
    student, teacher = (4 * torch.randn(5, 600, generator=generator) for _ in range(2))
    teacher[:, :300] -= 20.0  # the maxima of the ranks differ
    labels, weights = torch.randint(600, (5,), generator=generator), torch.rand(5, generator=generator)
    for tau in (1.0, 1.7):
        whole = LossSettings(0.7, 0.3, tau, True, VocabShard(0, 600, 600, None))
        expected, gradient = chunk_loss(student.double(), teacher.double(), labels, weights.double(), whole)
        mine = slice(rank * 600 // size, (rank + 1) * 600 // size)
        split = replace(whole, shard=VocabShard.of(600 // size, group))
        parts = student[:, mine].contiguous(), teacher[:, mine].contiguous()
        found, part = fused_chunk_loss(*parts, labels, weights, split, torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(part.double(), gradient[:, mine], rtol=0, atol=1e-6)


def test_fused_chunk_of_a_split_vocabulary_is_that_of_the_whole():
    run_distributed(_fused_chunk, 2)


def _head_gradients(chunk_tokens: int, in_buffer: bool) -> tuple[dict[str, Tensor], bool]:
    """Take two micro-batches, the second of twice the loss weight; whole head, then a cut one, all in fp64.

    Returns the head's gradient of either, as an optimizer would find it, with the hidden states' of the first, and
    whether autograd handed the whole head any.
    """
    inputs, group = Inputs.draw(), dist.group.WORLD
    rows = slice(
        dist.get_rank() * VOCAB // dist.get_world_size(), (dist.get_rank() + 1) * VOCAB // dist.get_world_size()
    )
    found, seen_by_autograd = {}, False
    for name, width in (("whole", WIDTH), ("cut", 5)):
        weight = inputs.student_head[rows].double().requires_grad_()
        buffer = torch.full_like(weight, 0.25)  # what other micro-batches left
        hidden = inputs.student_hidden.flatten(0, 1)[:, :width].double().requires_grad_()
        direct = in_buffer and name == "whole"
        for factor in (1.0, 2.0):
            total = distillation_loss(
                hidden,
                weight if name == "whole" else weight[:, :width],
                inputs.teacher_hidden.flatten(0, 1).double(),
                inputs.teacher_head[rows].double(),
                inputs.labels.t().reshape(-1),
                factor * inputs.token_weights.t().reshape(-1),
                kl_weight=1.0,
                cross_entropy_weight=0.3,
                temperature=1.5,
                chunk_tokens=chunk_tokens,
                tp_group=group,
                head_gradient=buffer if direct else None,
            ).total
            total.backward()
            if weight.grad is not None:
                seen_by_autograd |= direct
                buffer, weight.grad = buffer + weight.grad, None
        found |= {f"{name} head": buffer - 0.25, f"{name} hidden": hidden.grad}
    return found, seen_by_autograd


def _plain_gradients(width: int) -> tuple[Tensor, Tensor]:
    """Return what autograd makes of the definition with full logits: the whole head's gradient, the hidden states'."""
    inputs = Inputs.draw()
    head = inputs.student_head.double().requires_grad_()
    hidden = inputs.student_hidden.flatten(0, 1)[:, :width].double().requires_grad_()
    weights, labels = inputs.token_weights.t().reshape(-1).double(), inputs.labels.t().reshape(-1)
    student = hidden @ head[:, :width].t()
    log_p = (inputs.teacher_hidden.flatten(0, 1).double() @ inputs.teacher_head.double().t() / 1.5).log_softmax(-1)
    kl = 1.5**2 * (log_p.exp() * (log_p - (student / 1.5).log_softmax(-1))).sum(-1)
    cross_entropy = -student.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    (3 * weights * (kl + 0.3 * cross_entropy)).sum().backward()
    assert head.grad is not None and hidden.grad is not None
    return head.grad, hidden.grad


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("chunk_tokens", [1, 7, S * B])
def test_two_micro_batches_sum_the_heads_gradient_in_its_buffer_or_through_autograd(
    size: int, chunk_tokens: int
) -> None:
    for in_buffer in (False, True):
        ranks = run_distributed(_head_gradients, size, chunk_tokens, in_buffer)
        assert not any(seen for _, seen in ranks), "the buffer has it; autograd must not bring it again"
        for name, width in (("whole", WIDTH), ("cut", 5)):
            head, hidden = _plain_gradients(width)
            found = torch.cat([result[f"{name} head"] for result, _ in ranks])
            torch.testing.assert_close(found, head, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(sum(r[f"{name} hidden"] for r, _ in ranks), hidden, rtol=1e-11, atol=1e-13)
