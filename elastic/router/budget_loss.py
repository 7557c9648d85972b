"""The router's losses: |cost of the expected widths / target - 1| from the one cost table, entropy, and a pull.

Shapes: ... any leading dimensions (noise draws, budgets), slots and K choices as in Space.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from elastic.space.axes import Axis
from elastic.space.cost import Budget, Deployment, Widths, cost, subnet_cost
from elastic.space.shape import Subnet
from elastic.space.space import Space


def budget_loss(
    space: Space, budgets: Sequence[Budget], probabilities: Mapping[Axis, Tensor], deployment: Deployment
) -> Tensor:
    """Return |cost / target - 1| [..., budgets], fp32, for probabilities [..., budgets, slots, K].

    Costs of 10^10 and their small differences do not fit fp32, so the table runs in fp64 and only the ratio is fp32.
    """
    table = cost(space.parent, Widths.expected(space, probabilities), deployment)
    columns = []
    for index, budget in enumerate(budgets):
        used = table[budget.metric]
        # A metric that no elastic axis touches is a plain number, the same for all draws.
        device = next(iter(probabilities.values())).device
        own = used[..., index] if isinstance(used, Tensor) else torch.full((), used, dtype=torch.float64, device=device)
        columns.append((own / budget.limit - 1.0).abs().float())
    return torch.stack(torch.broadcast_tensors(*columns), dim=-1)


def cost_shares(space: Space, budgets: Sequence[Budget], deployment: Deployment) -> dict[Axis, Tensor]:
    """Return the share of the parent's cost that each elastic axis alone can remove: [budgets], fp32, in its metric."""
    full = subnet_cost(space.parent, Subnet.full(space.parent), deployment)
    shares = {}
    for axis in space.elastic_axes():
        last = len(space.axes[axis].choices) - 1
        smallest = subnet_cost(space.parent, space.subnet({axis: (last,) * space.num_slots(axis)}), deployment)
        shares[axis] = torch.tensor([1.0 - float(smallest[b.metric]) / float(full[b.metric]) for b in budgets])
    return shares


def choice_entropy(logits: Mapping[Axis, Tensor], scale: float, shares: Mapping[Axis, Tensor]) -> Tensor:
    """Return the entropy of the noise-free choices in nats, fp32: mean over slots, sum over budgets and axes.

    Each axis counts by its share of the cost ([budgets], `cost_shares`). Rewarded early in a phase and no more at its
    end (ours): a router that is certain of most slots while the temperature still falls cannot correct its cost by the
    width of one slot later. The loss one slot can move shrinks with its share, so an unweighted sum over the slots of
    a large parent would outweigh it and hold them all undecided until the end.
    """
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for axis, values in logits.items():
        log_probabilities = torch.log_softmax(values.float() * scale, dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)  # [budgets, slots]
        total = total + (shares[axis] * entropy.mean(dim=-1)).sum()
    return total


def pull(
    logits: Mapping[Axis, Tensor],
    scale: float,
    shares: Mapping[Axis, Tensor],
    index: int,
    wanted: Mapping[Axis, Tensor],
) -> Tensor:
    """Return the cross-entropy in nats, fp32, of choices `wanted` [slots] under those of budget `index`, without noise.

    Mean over slots, each axis by its share of the cost, as `choice_entropy`: about what the budget loss could move.
    """
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for axis, choices in wanted.items():
        own = torch.nn.functional.cross_entropy(logits[axis][index].float() * scale, choices)
        total = total + shares[axis][index] * own
    return total
