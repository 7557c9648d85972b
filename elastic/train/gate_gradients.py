"""Bring the gradients of one micro-batch's gates together from the ranks that saw different parts of it.

The residual stream is replicated over tensor-parallel ranks (unless sequence parallel splits its tokens), so the axes
that gate the stream, hidden and depth, count once; inner axes are sharded and are summed. Pipeline stages hold
different layers and context-parallel ranks different tokens: always summed.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from elastic.space.axes import STREAM_AXES, Axis
from elastic.world.groups import World


def sum_gate_gradients(flat: Tensor, entries: Iterable[tuple[Axis, int]], world: World) -> Tensor:
    """Sum `flat` over one replica, equal on all its ranks; `entries` lists (axis, number of values) in flat's order."""
    counted_here = world.layout.sequence or world.groups.tp.rank() == 0
    weights = [
        torch.full((size,), float(counted_here or axis not in STREAM_AXES), device=flat.device)
        for axis, size in entries
    ]
    return world.sum_over_replica(flat * torch.cat(weights))


def sum_router_gradients(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Sum the router's gradients over replicas, in one exchange over all ranks: equal bits everywhere."""
    groups = world.groups
    speaks = groups.tp.rank() == 0 and groups.pp.rank() == 0 and groups.cp.rank() == 0
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) * float(speaks)
    torch.distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
