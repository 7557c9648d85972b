"""Limits on any metrics of the cost table, several at once, as a person writes them: params<=7e9,latency_ms<=20."""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.config.load import ConfigError, Problem
from elastic.space.cost import Cost, Deployment, Metric, subnet_cost
from elastic.space.reach import smallest_subnet
from elastic.space.shape import Subnet
from elastic.space.space import Space

FIELD = "constraint"
_LIMIT = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([^<>=\s]+)\s*")


class ConstraintError(ConfigError):
    """A constraint that cannot be read, or that no subnet meets."""


@dataclass(frozen=True)
class Limit:
    """A bound on one metric, from above or from below."""

    metric: Metric
    is_upper: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.is_upper else '>='}{self.bound:.10g}"

    def excess(self, used: Tensor) -> Tensor:
        """Return by which share of the bound each of `used` [C] misses it, 0 where it is met."""
        over = used.double() / self.bound - 1.0
        return (over if self.is_upper else -over).clamp(min=0.0)

    def loosened(self, used: float) -> "Limit":
        """Return the limit if `used` meets it, else the nearest one that it meets, in six digits."""
        if not bool(self.excess(torch.tensor(used, dtype=torch.float64))):
            return self
        step = 10.0 ** (math.floor(math.log10(used)) - 5)
        bound = (math.ceil(used / step) if self.is_upper else math.floor(used / step)) * step
        return replace(self, bound=bound)


def read_constraint(text: str | None) -> tuple[Limit, ...]:
    """Read limits with commas between them, none from null; raises ConstraintError with all that cannot be read."""
    limits, problems = list[Limit](), list[Problem]()
    for part in (text or "").split(",") if text else ():
        found = _LIMIT.fullmatch(part)
        if found is None:
            rule = f"{part.strip() or 'nothing'} is no limit"
            problems.append(Problem(FIELD, text, rule, "write METRIC<=NUMBER or METRIC>=NUMBER, commas between them"))
            continue
        name, sign, number = found.groups()
        known = [metric.value for metric in Metric]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            rule = f"{name} is none of the metrics {', '.join(known)}"
            problems.append(Problem(FIELD, text, rule, f"nearest legal name is {near}"))
        elif (bound := _number(number)) is None:
            rule = f"{number} is not a number above 0"
            problems.append(Problem(FIELD, text, rule, f"write {name}{sign}NUMBER, for example {name}{sign}7e9"))
        else:
            limits.append(Limit(Metric(name), sign == "<=", bound))
    for (metric, is_upper), times in Counter((limit.metric, limit.is_upper) for limit in limits).items():
        if times > 1:
            sign = "<=" if is_upper else ">="
            problems.append(Problem(FIELD, text, f"{metric}{sign} stands {times} times", "give it once"))
    if problems:
        raise ConstraintError(problems)
    return tuple(limits)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def reach_problems(text: str | None, space: Space, deployment: Deployment) -> Iterator[Problem]:
    """Yield a problem for every limit that even the smallest subnet, or the parent, misses: the nearest possible."""
    low, high = (
        subnet_cost(space.parent, one, deployment) for one in (smallest_subnet(space), Subnet.full(space.parent))
    )
    for limit in read_constraint(text):
        if getattr(high, limit.metric.value) is None:
            rule = f"the deployment that the family was trained for says nothing of {limit.metric}"
            yield Problem(FIELD, text, rule, "leave it out, or set latency=FILE, what recipes/measure_latency.py wrote")
            continue
        ends = sorted((float(low[limit.metric]), float(high[limit.metric])))
        best = ends[0] if limit.is_upper else ends[1]
        if bool(limit.excess(torch.tensor(best, dtype=torch.float64))):
            rule = f"{limit} is outside what the choices can reach, {ends[0]:,.6g} to {ends[1]:,.6g}"
            yield Problem(FIELD, text, rule, f"nearest possible is {limit.loosened(best)}")


def met(text: str | None, limits: Sequence[Limit], used: Cost, num_candidates: int) -> Tensor:
    """Return which candidates meet all limits, [C] bool, their costs being [C] or one number for all.

    Raises ConstraintError where none does, with the one that misses by the least.
    """
    if not limits:
        return torch.ones(num_candidates, dtype=torch.bool)
    costs = [metric_values(used, limit.metric, num_candidates) for limit in limits]
    missed = torch.stack([limit.excess(own) for limit, own in zip(limits, costs, strict=True)]).amax(0)
    if not bool((missed == 0).any()):
        nearest = int(missed.argmin())
        loosened = [limit.loosened(float(own[nearest])) for limit, own in zip(limits, costs, strict=True)]
        limit = ",".join(map(str, loosened))
        rule = f"none of {num_candidates:,} subnets meets all of it"
        raise ConstraintError([Problem(FIELD, text, rule, f"nearest possible is {limit}")])
    return missed == 0


def metric_values(used: Cost, metric: Metric, num_candidates: int) -> Tensor:
    """Return one metric of all candidates, [C] fp64; a metric that no elastic axis touches is the same for all."""
    return torch.as_tensor(used[metric], dtype=torch.float64).expand(num_candidates)
