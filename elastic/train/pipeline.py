"""Run micro-batches through Megatron-Core's pipeline schedule: the teacher's pass, the student's pass, evaluation.

Shapes: B sequences, S sequence, s this context-parallel rank's share, D hidden, d kept width, N = s*B tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from elastic.config.sections import DistillConfig
from elastic.data.stream import Batch
from elastic.distill.kl import distillation_loss
from elastic.model.documents import copied
from elastic.model.forward import context_parallel_slice, parallel_hidden
from elastic.model.model import ElasticModel
from elastic.space.gates import Gates
from elastic.train.optimizer import AllReady, overlaps, reduced_at_once, say_added
from elastic.world.groups import World


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch needs: tokens and labels [B, s], its gates (None: the whole parent), the teacher's states.

    `token_weights` [B, s] is 0 where the data's mask leaves a label out, or a row only fills up; None counts all.
    `positions` [B, S], of whole sequences and on the CPU, say where documents start (None: a sequence is one).
    `sources` of the rows in a blend; empty without one.
    """

    tokens: Tensor
    labels: Tensor
    token_weights: Tensor | None = None
    gates: Gates | None = None
    teacher_hidden: Tensor | None = None
    positions: Tensor | None = None
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class MicroBatchLoss:
    """Sums over the tokens this rank saw, fp32; on the last pipeline stage only. `budget` as in Gates.

    Of a blend also by row: `rows` [4, B] fp64, kl, cross-entropy and the tokens of each, and the rows' `sources`.
    """

    budget: int | None
    num_tokens: Tensor | int
    kl: Tensor | None
    cross_entropy: Tensor | None
    rows: Tensor | None = None
    sources: tuple[int, ...] = ()


class PipelineRunner:
    """Drives student and teacher stages of this rank; the loss is taken from final hidden states (docs/design.md 6)."""

    def __init__(
        self, world: World, student: nn.Module, loss: DistillConfig, teacher: ElasticModel | None = None
    ) -> None:
        """Take the student as the schedule runs it (wrapped or bare) and an optional frozen teacher.

        With `loss.teacher` trained it is the student's own whole model, which learns the text (eq. 15).
        """
        self.world, self.student, self.teacher, self.loss = world, student, teacher, loss
        bare = student.module if isinstance(student, DistributedDataParallel) else student
        assert isinstance(bare, ElasticModel)
        self.student_model, self._gathering = bare, False

    def share(self, batch: Batch, gates: Gates | None = None) -> MicroBatch:
        """Take this context-parallel rank's share of a batch of whole sequences and move it to the device."""
        cp = self.world.groups.cp

        def share(t: Tensor) -> Tensor:
            return context_parallel_slice(copied(t, self.world.device), cp.rank(), cp.size())

        weights = None if batch.counts_all else share(batch.token_weights())
        tokens, labels = share(batch.tokens), share(batch.labels)
        return MicroBatch(tokens, labels, weights, gates, positions=batch.positions, sources=batch.sources)

    def start_gather(self) -> None:
        """Begin to gather the weights an optimizer stepped on other ranks, if the config leaves that to the runner.

        The teacher's pass hides it. Whoever reads the student's weights waits first: this class, or `finish_gather`.
        """
        if isinstance(self.student, DistributedDataParallel) and self.student.ddp_config.overlap_param_gather:
            self.student.start_param_sync()
            self._gathering = True

    def finish_gather(self) -> None:
        """Let the device, not the host, wait for the weights; on all ranks alike."""
        if self._gathering:
            assert isinstance(self.student, DistributedDataParallel)
            for bucket_group in self.student.bucket_groups:
                bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)
            self._gathering = False

    def with_teacher(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Run the teacher over all micro-batches first and leave its hidden states with them on the last stage."""
        if self.teacher is None:
            return list(micro_batches)
        with torch.no_grad():
            hidden = self._schedule(self.teacher, micro_batches, _keep_hidden, forward_only=True)
        if not self.world.is_last_stage:
            return list(micro_batches)
        return [replace(batch, teacher_hidden=states) for batch, states in zip(micro_batches, hidden, strict=True)]

    def forward_backward(self, micro_batches: Sequence[MicroBatch], *, ends_alike: bool = True) -> list[MicroBatchLoss]:
        """Run the student forward and backward; gradients are summed over ranks and divided by all that count.

        `ends_alike` says that the last micro-batch has the same budget on all replicas: then their gradients become
        ready in one order, and the reduction may run beside its backward pass. The same answer on all ranks.
        """
        self.finish_gather()
        wrapped = self.student
        hidden_behind = ends_alike or not isinstance(wrapped, DistributedDataParallel)
        with nullcontext() if hidden_behind else reduced_at_once(wrapped):
            if self.loss.teacher == "frozen":
                return self._schedule(wrapped, micro_batches, self._student_loss, forward_only=False)
            in_turns = [one for batch in micro_batches for one in (replace(batch, gates=None), batch)]
            return self._schedule(wrapped, in_turns, self._loss_in_turns(), forward_only=False)[1::2]

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], position_buckets: int = 1) -> list[MicroBatchLoss]:
        """Run the student forward only and report the loss: without a teacher's states, the cross-entropy.

        With several `position_buckets` each micro-batch has so many reports, one behind the other: of equal parts of
        its sequences, from the front.
        """
        self.finish_gather()
        loss = partial(self._losses_by_position, position_buckets) if position_buckets > 1 else self._student_loss
        reports = self._schedule(self.student_model, micro_batches, loss, forward_only=True)
        return reports if position_buckets == 1 else [one for of_batch in reports for one in of_batch]

    def _losses_by_position(
        self, position_buckets: int, batch: MicroBatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, list[MicroBatchLoss]]:
        """Do what `_student_loss` does, part by part of the sequence; this rank may have tokens of some parts only."""
        cp, (num_sequences, length) = self.world.groups.cp, batch.labels.shape
        places = torch.arange(length * cp.size())[None]
        parts = context_parallel_slice(places, cp.rank(), cp.size())[0] * position_buckets // places.numel()
        tokens, found = self._tokens(hidden).unflatten(0, (length, num_sequences)), []
        for part in range(position_buckets):
            mine = (parts == part).nonzero()[:, 0].to(hidden.device)
            weights = None if batch.token_weights is None else batch.token_weights[:, mine]
            own = replace(batch, labels=batch.labels[:, mine], token_weights=weights)
            found.append(self._loss_of(own, tokens[mine].flatten(0, 1)))
        totals, counted, reports = zip(*found, strict=True)
        return torch.stack(totals).sum(), torch.stack(counted).sum(), list(reports)

    def _schedule(
        self, model: nn.Module, micro_batches: Sequence[MicroBatch], loss: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        is_teacher = model is self.teacher

        def forward_step(batches: Iterator[MicroBatch], stage: nn.Module, *_: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            gates = None if is_teacher else batch.gates
            hidden = stage(batch.tokens, gates, positions=batch.positions)
            if batch is micro_batches[-1] and not forward_only:
                hidden = self._with_all_ready(hidden, batch.gates)
            return hidden, partial(loss, batch)

        batch_size, local_tokens = micro_batches[0].tokens.shape
        was_training = model.training
        model.train(not forward_only)
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=local_tokens * self.world.groups.cp.size(),
            micro_batch_size=batch_size,
            forward_only=forward_only,
            collect_non_loss_data=is_teacher,
        )
        model.train(was_training)
        return outputs

    def _with_all_ready(self, hidden: Tensor, gates: Gates | None) -> Tensor:
        """Have the backward pass from `hidden` say that the layers which `gates` skip have all their gradient.

        A bucket is reduced once all its gradients are ready, which those of a skipped layer would never be.
        """
        if not overlaps(self.student) or gates is None or gates.subnet is None:
            return hidden
        layers, kept = self.student_model.decoder.layers, gates.subnet.kept_layers
        idle = [p for layer in layers if layer.layer_number - 1 not in kept for p in layer.parameters()]
        return AllReady.apply(hidden, *idle) if idle else hidden

    def _loss_in_turns(self) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, MicroBatchLoss]]:
        """Return the loss of passes in turns, a micro-batch's whole model and then its student: eq. 15.

        The first learns the text, and its states, detached, are the teacher's of the second. They go through the last
        stage in this order in every schedule. Tokens count once, with the student.
        """
        left, whole = list[Tensor](), self.loss.teacher_cross_entropy_weight

        def loss(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, MicroBatchLoss]:
            if left:
                return self._student_loss(replace(batch, teacher_hidden=left.pop()), hidden)
            left.append(hidden.detach())
            total, counted, report = self._loss_of(batch, self._tokens(hidden), whole)
            return total, torch.zeros_like(counted), report

        return loss

    def _student_loss(self, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, MicroBatchLoss]:
        """Return (sum of the loss over this rank's tokens, their number, report) as the schedule wants it."""
        return self._loss_of(batch, self._tokens(hidden))

    def _loss_of(
        self, batch: MicroBatch, tokens: Tensor, cross_entropy_weight: float | None = None
    ) -> tuple[Tensor, Tensor, MicroBatchLoss]:
        """Return that of the states [N, d] of a micro-batch; `cross_entropy_weight` None is the student's."""
        weights = None if batch.token_weights is None else batch.token_weights.t().reshape(-1)
        teacher_hidden, teacher_head = None, None
        if batch.teacher_hidden is not None:
            of_teacher = self.teacher or self.student_model
            teacher_hidden, teacher_head = self._tokens(batch.teacher_hidden), of_teacher.head_weight().detach()
        given = self.loss.cross_entropy_weight if cross_entropy_weight is None else cross_entropy_weight
        head = self.student_model.head_weight(batch.gates)
        terms = distillation_loss(
            tokens,
            head,
            teacher_hidden,
            teacher_head,
            batch.labels.t().reshape(-1),
            weights,
            kl_weight=0.0 if teacher_hidden is None else self.loss.kl_weight,
            cross_entropy_weight=given,
            temperature=self.loss.temperature,
            chunk_tokens=self.loss.chunk_tokens,
            tp_group=self.world.groups.tp,
            report_cross_entropy=True,
            head_gradient=self._head_gradient(head),
            num_rows=max(1, len(batch.sources)),
        )
        counted = torch.full((), batch.labels.numel(), dtype=torch.int, device=tokens.device)  # no copy to wait for
        if weights is not None:
            counted = weights.sum().int()
        budget = None if batch.gates is None else batch.gates.budget
        report = MicroBatchLoss(budget, counted, terms.kl, terms.cross_entropy)
        if batch.sources:
            of_row = torch.full_like(terms.by_row[0], batch.labels.shape[1])
            if batch.token_weights is not None:
                of_row = batch.token_weights.sum(1, dtype=torch.double)
            of_kl = torch.zeros_like(of_row) if terms.kl is None else of_row
            rows = torch.stack([*terms.by_row, of_kl, of_row])
            report = replace(report, rows=rows, sources=batch.sources)
        return terms.total, counted, report

    def _head_gradient(self, head: Tensor) -> Tensor | None:
        """Return where micro-batches sum the gradient of the head's columns in `head`, past autograd."""
        trains = head.requires_grad and torch.is_grad_enabled()
        if not trains or not isinstance(self.student, DistributedDataParallel):
            return None
        model, parameter = self.student_model, self.student_model.head_weight()
        if overlaps(self.student) and not (model.share_embeddings_and_output_weights and model.pre_process):
            say_added(parameter)  # where it embeds too, that gradient comes through autograd
        columns: Tensor = parameter.main_grad[:, : head.shape[1]]  # type: ignore[attr-defined]  # the wrapper's
        return columns

    def _tokens(self, hidden: Tensor) -> Tensor:
        return parallel_hidden(hidden, self.world.layout.sequence, self.world.groups.tp)


def _keep_hidden(batch: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
    """Hand the final hidden states through the schedule as they are."""
    return hidden.detach()
