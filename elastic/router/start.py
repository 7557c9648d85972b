"""Where a new budget's choices begin: a router moved until it chooses a given subnet, unmoved for the other budgets."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from elastic.router.decide import RouterError
from elastic.router.router import Router
from elastic.space.axes import Axis

MARGIN = 1.0  # of the chosen logit over each other one, ours: at the last logit scale, 10, decided as after a run
MOST_ROUNDS = 3000
RATE = 0.1


def start_at(router: Router, budget: int, chosen: Mapping[Axis, Sequence[int]]) -> None:
    """Move the input of one budget (its column of every first layer) until its logits choose `chosen` by MARGIN.

    Nothing else of the router moves, so the other budgets' logits stay equal to the last bit. Computed in fp64 on the
    CPU, without a random number. Raises RouterError, and moves nothing, where hidden_width is too small to hold the
    choices.
    """
    moved: list[tuple[nn.Linear, Tensor]] = []
    for axis, indices in chosen.items():
        network = router.networks[axis.value]
        assert isinstance(network, nn.Sequential)
        first, activation, last = network
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        wanted = torch.tensor(indices)
        others = torch.nn.functional.one_hot(wanted, router.sizes[axis][1]) == 0  # [slots, K]
        column = first.weight.detach()[:, budget].double().cpu().clone().requires_grad_()
        fixed = [values.detach().double().cpu() for values in (first.bias, last.weight, last.bias)]
        optimizer = torch.optim.Adam([column], lr=RATE)
        for _ in range(MOST_ROUNDS):
            logits = _logits(column, fixed, activation, router, axis)
            lead = logits.gather(-1, wanted[:, None]) - logits
            missing = (MARGIN - lead)[others].clamp(min=0.0)
            # Half way into the margin is as good: the rest is what rounding to fp32 may take.
            if float(missing.detach().amax()) < MARGIN / 2:
                break
            optimizer.zero_grad()
            missing.sum().backward()
            optimizer.step()
        else:
            raise RouterError(
                f"router: hidden_width = {router.hidden_width} is too small for {axis} to begin with a subnet of "
                f"{len(indices)} choices among {router.sizes[axis][1]}; train without a start for this budget (not "
                "in init_from.subnets, elastic.router.start=uniform)"
            )
        moved.append((first, column))
    with torch.no_grad():
        for first, column in moved:
            first.weight[:, budget] = column.to(first.weight)


def _logits(column: Tensor, fixed: Sequence[Tensor], activation: nn.Module, router: Router, axis: Axis) -> Tensor:
    """Return the logits [slots, K] of one budget whose column of the first layer is `column`, as Router.forward."""
    first_bias, weight, bias = fixed
    hidden: Tensor = activation(column + first_bias)
    return (weight @ hidden + bias).view(router.sizes[axis]) / router.hidden_width**0.5
