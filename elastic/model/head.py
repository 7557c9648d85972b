"""Between the last stage's hidden states and a head whose rows are split over the vocabulary.

S sequence, B batch, D hidden, V vocab; lower case = this rank.
"""

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor


def parallel_hidden(hidden: Tensor, sequence_parallel: bool, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Flatten [S, B, D] hidden states to [S * B, D] for a loss whose head is split over the vocabulary.

    With sequence parallelism, `hidden` is [S / tp, B, D] and is gathered. The backward pass sums the ranks' partial
    gradients (all-reduce, or reduce-scatter with sequence parallelism), which is what `distillation_loss` needs.
    Token (s, b) lands in row s * B + b: labels [B, S] must be given as `labels.t().reshape(-1)`.
    """
    if tp_group is not None and tp_group.size() > 1:
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    return hidden.flatten(0, 1)


def gathered_logits(hidden: Tensor, head_weight: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Map hidden states [..., D] and this rank's rows of the head [v, D] to logits [..., V], alike on every rank."""
    logits: Tensor = gather_from_tensor_model_parallel_region(hidden @ head_weight.t(), group=tp_group)
    return logits
