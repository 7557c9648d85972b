"""Budgets: what the user asks for, in absolute units."""

import re
from dataclasses import dataclass

from elastic.space.cost import Deployment, Metric, subnet_cost
from elastic.space.shape import ModelShape
from elastic.space.subnet import Subnet

# A budget's name is also that of a folder (extract) and of columns in logs.
NAME_PATTERN = r"\w[\w.+-]{0,99}"


class BudgetError(ValueError):
    """A budget that names no target, two targets, or one the parent cannot meet."""


@dataclass(frozen=True)
class Budget:
    """A named limit: at most `target` units of `metric` (parameters, bytes or FLOPs per token)."""

    name: str
    metric: Metric
    target: float

    @classmethod
    def from_ratio(
        cls, name: str, metric: Metric, ratio: float, parent: ModelShape, deployment: Deployment
    ) -> "Budget":
        """Make an absolute budget from a share of the parent's cost, 0 < ratio <= 1."""
        if not 0 < ratio <= 1:
            raise BudgetError(f"budget {name}: ratio = {ratio} must be above 0 and at most 1")
        full = subnet_cost(parent, Subnet.full(parent), deployment)[metric]
        return cls(name, metric, ratio * float(full))

    def __post_init__(self) -> None:
        if re.fullmatch(NAME_PATTERN, self.name) is None:
            raise BudgetError(f"budget {self.name!r}: a name is made of letters, digits, _ . + and -")
        if self.target <= 0:
            raise BudgetError(f"budget {self.name}: target = {self.target} must be above 0")


def check_reachable(budget: Budget, parent: ModelShape, smallest: Subnet, deployment: Deployment) -> None:
    """Raise BudgetError unless the target lies between the smallest subnet and the parent (0.1% slack)."""
    low = subnet_cost(parent, smallest, deployment)[budget.metric]
    high = subnet_cost(parent, Subnet.full(parent), deployment)[budget.metric]
    if not low * 0.999 <= budget.target <= high * 1.001:
        nearest = low if budget.target < low else high
        raise BudgetError(
            f"budget {budget.name}: target {budget.target:,.0f} {budget.metric} lies outside what the choices can "
            f"reach, {low:,.0f} to {high:,.0f}; nearest reachable is {nearest:,.0f}"
        )
