"""Budgets: what the user asks for, in absolute units or as a share of the parent."""

from dataclasses import dataclass, replace

from elastic.space.cost import Deployment, Metric, shape_cost, subnet_cost
from elastic.space.ranges import MemberName, Share, Target
from elastic.space.shape import ModelShape
from elastic.space.subnet import Subnet


class BudgetError(ValueError):
    """A budget that the choices cannot meet."""


@dataclass(frozen=True)
class Budget:
    """A named limit on one metric: `target` in absolute units, or `ratio` of the parent's cost. Exactly one."""

    name: MemberName
    metric: Metric = Metric.PARAMS
    target: Target | None = None
    ratio: Share | None = None

    @property
    def limit(self) -> float:
        """Return the target (parameters, bytes or FLOPs per token); a ratio is made absolute first."""
        assert self.target is not None, "Budget.absolute comes first"
        return self.target

    def absolute(self, parent: ModelShape, deployment: Deployment) -> "Budget":
        """Return the budget with its ratio turned into a target."""
        if self.ratio is None:
            return self
        return replace(self, target=self.ratio * float(shape_cost(parent, deployment)[self.metric]), ratio=None)


def check_reachable(budget: Budget, parent: ModelShape, smallest: Subnet, deployment: Deployment) -> None:
    """Raise BudgetError unless the target lies between the smallest subnet and the parent (0.1% slack)."""
    low = subnet_cost(parent, smallest, deployment)[budget.metric]
    high = shape_cost(parent, deployment)[budget.metric]
    if not low * 0.999 <= budget.limit <= high * 1.001:
        nearest = low if budget.limit < low else high
        raise BudgetError(
            f"budget {budget.name}: target {budget.limit:,.0f} {budget.metric} lies outside what the choices can "
            f"reach, {low:,.0f} to {high:,.0f}; nearest reachable is {nearest:,.0f}"
        )
