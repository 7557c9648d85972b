"""What scored subnets are worth beside each other: the Pareto front, the line between trained budgets, a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic.space.cost import Cost, Metric
from elastic.space.shape import Subnet


@dataclass(frozen=True)
class Scored:
    """One measured subnet: what it costs in the metric of the search, what it loses, and how it was proposed."""

    name: str
    subnet: Subnet
    cost: Cost
    used: float
    score: float
    origin: str

    @property
    def is_trained(self) -> bool:
        """Tell whether it is the choice of a budget that was trained."""
        return self.origin == TRAINED


TRAINED = "trained"
GIVEN = "given"


def pareto_front(members: Sequence[Scored]) -> list[Scored]:
    """Return those that nothing cheaper or equally cheap beats, cheapest first: each next one scores lower."""
    front: list[Scored] = []
    for member in sorted(members, key=lambda one: (one.used, one.score)):
        if not front or member.score < front[-1].score:
            front.append(member)
    return front


def above_line(member: Scored, members: Sequence[Scored]) -> float | None:
    """Return how far a score lies above the straight line between the trained budgets around its cost; None outside."""
    trained = sorted((one for one in members if one.is_trained), key=lambda one: one.used)
    smaller = [one for one in trained if one.used <= member.used]
    larger = [one for one in trained if one.used >= member.used]
    if not smaller or not larger:
        return None
    low, high = smaller[-1], larger[0]
    share = 0.0 if high.used == low.used else (member.used - low.used) / (high.used - low.used)
    return member.score - (low.score + (high.score - low.score) * share)


def draw_front(members: Sequence[Scored], metric: Metric, score_name: str, path: Path) -> None:
    """Draw score against cost: trained budgets and the line between them, what was found, and the front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = sorted((one for one in members if one.is_trained), key=lambda one: one.used)
    others, front = [one for one in members if not one.is_trained], pareto_front(members)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot([one.used for one in trained], [one.score for one in trained], "--", color="0.6", zorder=1)
    axes.plot(
        [one.used for one in front], [one.score for one in front], "-", color="C0", drawstyle="steps-post",
        label="front", zorder=2,
    )  # fmt: skip
    axes.plot(
        [one.used for one in others], [one.score for one in others], "o", color="C0", label="not trained", zorder=3
    )
    axes.plot(
        [one.used for one in trained], [one.score for one in trained], "*", color="C3", markersize=14,
        label="trained budgets", zorder=4,
    )  # fmt: skip
    for one in trained:
        axes.annotate(one.name, (one.used, one.score), textcoords="offset points", xytext=(8, 8))
    axes.set(xlabel=metric.value, ylabel=score_name, title="What sizes between the budgets are worth")
    axes.margins(x=0.1)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
