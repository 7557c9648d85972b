"""What a run says of its router: where it stands at a step, and at the end which budgets its choices miss."""

from collections.abc import Iterator
from typing import Any

from elastic.router.decide import likeliest
from elastic.router.draw import Chooser
from elastic.space.cost import Budget, subnet_cost
from elastic.space.shape import Subnet
from elastic.train.trainer import StepResult


def router_values(chooser: Chooser | None, result: StepResult) -> dict[str, float]:
    """Return a step's schedules, every budget's likeliest subnet (cost / target, widths) and loss."""
    if chooser is None:
        return {}
    moment = result.moment
    values = {
        "temperature": moment.temperature,
        "logit_scale": moment.logit_scale,
        "router_learning_rate": 0.0 if moment.elastic.router_frozen else moment.router_learning_rate,
    }
    for index, budget in enumerate(chooser.budgets):
        subnet = likeliest(chooser.router, chooser.space, index)
        values[f"router/{budget.name}/cost_ratio"] = _used(chooser, subnet, budget) / budget.limit
        shape = subnet.shape(chooser.space.parent)
        values |= {
            f"router/{budget.name}/width/{axis}": shape.mean_width(axis) for axis in chooser.space.elastic_axes()
        }
    if result.budget_losses is not None:
        for budget, loss in zip(chooser.budgets, result.budget_losses.tolist(), strict=True):
            values[f"router/{budget.name}/budget_loss"] = loss
    return values


def off_budget(chooser: Chooser) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield an event, its text and its values for each budget whose likeliest subnet is not within its tolerance.

    `choice_moved`: another was taken for it. `budget_missed`: what was taken is off, too.
    """
    for index, budget in enumerate(chooser.budgets):
        own, chosen = likeliest(chooser.router, chooser.space, index), chooser.decide(index)
        used = {"likeliest": _used(chooser, own, budget), "chosen": _used(chooser, chosen, budget)}
        missed = {name: abs(value / budget.limit - 1.0) for name, value in used.items()}
        values = {"budget": budget.name, "metric": budget.metric.value, "target": budget.limit, **used}
        if missed["chosen"] > budget.tolerance:
            text = f"budget {budget.name} is missed by {missed['chosen']:.1%}; no subnet of the space comes within"
            text = (
                f"{text} {100 * budget.tolerance:g}%: give an axis more choices, move the target or raise its tolerance"
            )
            yield "budget_missed", text, values
        elif missed["likeliest"] > budget.tolerance:
            text = f"budget {budget.name}: the router's likeliest subnet misses it by {missed['likeliest']:.1%}"
            yield "choice_moved", f"{text}; taken is the likeliest one within {100 * budget.tolerance:g}%", values


def _used(chooser: Chooser, subnet: Subnet, budget: Budget) -> float:
    return float(subnet_cost(chooser.space.parent, subnet, chooser.deployment)[budget.metric])
