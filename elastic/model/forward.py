"""Run a whole model without gradients, whatever its pipeline: evaluation, importance, teachers; and go from its hidden
states to a head whose rows are split over the vocabulary.

Shapes: B batch, S sequence (of this context-parallel rank), D hidden, d kept hidden width, V vocab, v this rank's rows.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from elastic.model.documents import context_spans
from elastic.model.model import ElasticModel
from elastic.model.observe import Observer
from elastic.space.gates import Gates


class SequenceLengthError(ValueError):
    """A sequence that the context-parallel ranks cannot share."""


class Sequences(NamedTuple):
    """Whole sequences of tokens [B, S] and, int32 [B, S], where in its document each stands (None: one a sequence)."""

    tokens: Tensor
    positions: Tensor | None = None


@torch.no_grad()
def forward_hidden(
    model: ElasticModel,
    tokens: Tensor,
    gates: Gates | None = None,
    observer: Observer | None = None,
    positions: Tensor | None = None,
) -> Tensor | None:
    """Map whole tokens [B, S] to final hidden states [S(/cp/tp), B, d] on the last pipeline stage, None on the others.

    The stages run one after another. Every rank of a replica calls this with the same whole sequences, in the same
    order, and runs its `context_parallel_slice` of them. `positions` as `ElasticModel.forward` takes them.
    """
    # 1. Take the stream of the stage before: [S(/tp), B, D].
    stages, cp, config = model.pg_collection.pp, model.pg_collection.cp, model.config
    tokens = context_parallel_slice(tokens, cp.rank(), cp.size()).to(next(model.parameters()).device)
    if not model.pre_process:
        batch, length = tokens.shape
        length //= model.pg_collection.tp.size() if config.sequence_parallel else 1
        stream = torch.empty(length, batch, config.hidden_size, dtype=config.params_dtype, device=tokens.device)
        dist.recv(stream, group=stages, group_src=stages.rank() - 1)
        model.set_input_tensor(stream)
    # 2. Run this stage.
    output = model(tokens, gates, observer, positions=positions)
    if not model.pre_process:
        model.set_input_tensor(None)  # the model must not keep the stream alive
    # 3. Hand it on.
    if model.post_process:
        return output
    dist.send(output.contiguous(), group=stages, group_dst=stages.rank() + 1)
    return None


def context_parallel_slice(tokens: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """Return one context-parallel rank's part [B, S/cp_size] of whole sequences [B, S].

    It is the two chunks of `context_spans`, so that all ranks attend to equally many tokens. Raises SequenceLengthError
    if S is not a multiple of 2 * cp_size.
    """
    if cp_size == 1:
        return tokens
    length, num_chunks = tokens.shape[1], 2 * cp_size
    if length % num_chunks:
        raise SequenceLengthError(
            f"sequence length {length}: must be a multiple of 2 x parallel.context = {num_chunks}, "
            f"nearest legal is {max(1, round(length / num_chunks)) * num_chunks}"
        )
    return torch.cat([tokens[:, first:end] for first, end in context_spans(length, cp_rank, cp_size)], dim=1)


def sees_own_tokens(model: ElasticModel) -> bool:
    """Tell whether this rank counts the tokens of the stream it sees, so that a sum over ranks counts each token once.

    Under sequence parallelism the tensor-parallel ranks share the tokens; without it all see the same, rank 0 counts.
    """
    return bool(model.config.sequence_parallel) or model.pg_collection.tp.rank() == 0


def sum_over_world(tensor: Tensor) -> None:
    """Sum `tensor` in place over every rank of the run: one collective, so that all ranks get the same bits."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)


def parallel_hidden(hidden: Tensor, sequence_parallel: bool, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Flatten [S, B, D] hidden states to [S * B, D] for a loss whose head is split over the vocabulary.

    With sequence parallelism, `hidden` is [S / tp, B, D] and is gathered. The backward pass sums the ranks' partial
    gradients (all-reduce, or reduce-scatter with sequence parallelism), which is what `distillation_loss` needs.
    Token (s, b) lands in row s * B + b: labels [B, S] must be given as `labels.t().reshape(-1)`.
    """
    if tp_group is not None and tp_group.size() > 1:
        if sequence_parallel:
            hidden = mappings.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=tp_group
            )
        else:
            hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    return hidden.flatten(0, 1)


def gathered_logits(hidden: Tensor, head_weight: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Map hidden states [..., D] and this rank's rows of the head [v, D] to logits [..., V], alike on every rank."""
    logits: Tensor = mappings.gather_from_tensor_model_parallel_region(hidden @ head_weight.t(), group=tp_group)
    return logits
