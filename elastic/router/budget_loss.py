"""The budget loss: |cost of the expected widths / target - 1|, from the one cost table.

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
        own = used[..., index] if isinstance(used, Tensor) else torch.tensor(float(used), dtype=torch.float64)
        device = next(iter(probabilities.values())).device
        columns.append((own.to(device) / budget.limit - 1.0).abs().float())
    return torch.stack(torch.broadcast_tensors(*columns), dim=-1)


def cost_shares(space: Space, budgets: Sequence[Budget], deployment: Deployment) -> dict[Axis, Tensor]:
    """Return the share of the parent's cost that each elastic axis alone can remove: [budgets], fp32, in its metric."""
    full = subnet_cost(space.parent, Subnet.full(space.parent), deployment)
    shares = {}
    for axis in space.elastic_axes():
        last = len(space.axes[axis].choices) - 1
        smallest = subnet_cost(space.parent, space.subnet({axis: (last,) * space.num_slots(axis)}), deployment)
        metrics = [budget.metric for budget in budgets]
        shares[axis] = torch.tensor([1.0 - float(smallest[metric]) / float(full[metric]) for metric in metrics])
    return shares
