"""Measured times in configs: what is measured, a table in the place of its file, what it must cover and leaves open."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from elastic.config.load import Problem, Problems, load_with_problems
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ElasticSection, ModelConfig
from elastic.config.verbs import CostConfig, SearchConfig
from elastic.space import ranges
from elastic.space.axes import Axis
from elastic.space.cost import MEASURED, Deployment, Metric
from elastic.space.latency import LatencyTable, Machine, grid_of
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, Space

FIELD = "elastic.deployment.latency"
TRUSTED = 0.1  # of a whole model's time: as near as the sum of its layers should come
MEASURE = "write one with recipes/measure_latency.py on the machine to deploy on"


@dataclass(frozen=True, kw_only=True)
class MeasureSection:
    """What is timed: every kind of layer at all choices of the space, `rounds` times in turn.

    `batches` and `lengths` empty take those of elastic.deployment. `whole`: the parent and the smallest subnet are
    timed as one, too, beside what the table says of them. With `folders`, exported Hugging Face folders, no table is
    measured: they are timed so beside the parent and the table that elastic.deployment.latency names.
    """

    batches: tuple[ranges.Sequences, ...] = ()
    lengths: tuple[ranges.Length, ...] = ()
    rounds: Annotated[int, ranges.Range(3, 1000)] = 7
    whole: bool = True
    folders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LatencyConfig(CostConfig):
    """recipes/measure_latency.py: times of layers at the choices of a run of the main job, on the device at hand.

    Its budgets do not matter here: they may wait for the table, which `output` names (null prints only).
    """

    measure: MeasureSection = field(default_factory=MeasureSection)


def with_table(kind: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Problem, ...]]:
    """Put the content of a named table into the config, which then needs the file no more; or say why it has none.

    So a run's resolved config and its checkpoints carry the times their budgets were met by. Where times are measured
    first, budgets are left out, and the table unless exports are timed beside it.
    """
    elastic = values.get("elastic")
    deployment = elastic.get("deployment") if isinstance(elastic, Mapping) else None
    if issubclass(kind, LatencyConfig) and isinstance(elastic, Mapping):
        elastic, given = {name: value for name, value in elastic.items() if name != "budgets"}, values.get("measure")
        if isinstance(deployment, Mapping) and not (isinstance(given, Mapping) and given.get("folders")):
            deployment = {name: value for name, value in deployment.items() if name != "latency"}
            elastic |= {"deployment": deployment}
        values = {**values, "elastic": elastic}
    if issubclass(kind, SearchConfig) and isinstance(path := values.get("latency"), str):
        content, problems = _read_table("latency", path)
        return {**values, "latency": content}, problems
    path = deployment.get("latency") if isinstance(deployment, Mapping) else None
    if not isinstance(elastic, Mapping) or not isinstance(deployment, Mapping) or not isinstance(path, str):
        return dict(values), ()
    content, problems = _read_table(FIELD, path)
    return {**values, "elastic": {**elastic, "deployment": {**deployment, "latency": content}}}, problems


def _read_table(field: str, path: str) -> tuple[Any, tuple[Problem, ...]]:
    """Return what a file holds, None with a problem where that is no table."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        wrong = load_with_problems(LatencyTable, content)[1]
        rule = f"is no table of times: {wrong[0]}" if wrong else None
    except OSError as error:
        rule = f"cannot be read: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        rule = f"is not JSON: {error}"
    return (content, ()) if rule is None else (None, (Problem(field, path, rule, MEASURE),))


def with_digest(values: dict[str, Any]) -> dict[str, Any]:
    """Put a digest in the place of the table in a config's values: between runs it differs, and is accepted, as one."""
    elastic = values.get("elastic") or {}
    deployment = elastic.get("deployment") or {}
    if (table := deployment.get("latency")) is None:
        return values
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]
    named = {**deployment, "latency": f"times of {table['machine']['name']}, sha256 {digest}"}
    return {**values, "elastic": {**elastic, "deployment": named}}


def check_alone(cluster: Cluster) -> Problems:
    """Times are taken by one process: others beside it would be timed, too, and write the same file."""
    if cluster.num_processes > 1:
        rule, remedy = "others beside it would slow down what is timed", "nearest legal value is 1: leave torchrun out"
        yield Problem("number of processes", cluster.num_processes, rule, remedy)


def check_latency(model: ModelConfig, elastic: ElasticSection) -> Problems:
    """A budget in time has a table; it is of this parent, and covers the conditions and every choice."""
    deployment, asked = elastic.deployment, [budget for budget in elastic.budgets if budget.metric in MEASURED]
    table = deployment.latency
    if table is None:
        for budget in asked:
            where = f"elastic.budgets.{elastic.budgets.index(budget)}.metric"
            yield Problem(where, budget.metric.value, f"needs measured times, and {FIELD} is null", MEASURE)
        return
    if model.vocab is not None:
        yield from table_problems(FIELD, table, deployment, model.shape(), elastic.space.axes())


def table_problems(
    field: str, table: LatencyTable, deployment: Deployment, parent: ModelShape, axes: Mapping[Axis, AxisChoices]
) -> Problems:
    """Yield why a table, given as `field`, says nothing of a parent, its choices, or this pass, batch and length."""
    if rules := list(table.problems(parent)):
        yield from (Problem(field, table.machine.name, f"the table {rule}", MEASURE) for rule in rules)
        return
    if deployment.measured is None:
        yield _no_such_pass(field, deployment, table)
    for axis, grid in grid_of(parent, {axis: own.choices for axis, own in axes.items()}).items():
        if beside := table.outside(axis, grid):
            low, high = table.widths[axis][0], table.widths[axis][-1]
            rule = f"times were measured for widths of {low} to {high}, and {_widths(beside)} may be chosen"
            name = f"elastic.space.{axis.value}" if field == FIELD else field
            yield Problem(name, list(grid), rule, f"leave them out, or {MEASURE}" if field == FIELD else MEASURE)


def check_floors(elastic: ElasticSection) -> Problems:
    """A speed is a floor, which a smaller model exceeds: no share of the parent's."""
    for index, budget in enumerate(elastic.budgets):
        if budget.metric is Metric.TOKENS_PER_S and budget.ratio is not None:
            rule = "every smaller model is faster, so no share of the parent's speed limits anything"
            remedy = f"give a target in tokens/s, or metric=latency_ms, ratio={budget.ratio:g} of the parent's time"
            yield Problem(f"elastic.budgets.{index}.ratio", budget.ratio, rule, remedy)


def _no_such_pass(field: str, deployment: Deployment, table: LatencyTable) -> Problem:
    """Say that nothing was measured for this pass, batch and length, and what is nearest; a family's are settled."""
    here = f"{deployment.timed} of {deployment.batch} x {deployment.length_tokens:,} tokens"
    there = ", ".join(one.conditions for one in table.measured) or "nothing"
    nearest = min(
        table.measured,
        key=lambda one: (
            one.timed != deployment.timed,
            one.batch != deployment.batch,
            abs(one.length_tokens - deployment.length_tokens),
        ),
        default=None,
    )
    remedy = MEASURE
    if field != FIELD:
        where = f"measure.batches=[{deployment.batch}] measure.lengths=[{deployment.length_tokens}]"
        remedy = f"{MEASURE}, with {where}"
    elif nearest is not None:
        wanted = {"timed": nearest.timed, "batch": nearest.batch, "length_tokens": nearest.length_tokens}
        change = [f"{name}={value}" for name, value in wanted.items() if getattr(deployment, name) != value]
        remedy = f"nearest legal is elastic.deployment.{', '.join(change)}, or {MEASURE}"
    return Problem(field, table.machine.name, f"the deployment is {here}, and the table holds {there}", remedy)


def latency_notes(deployment: Deployment, space: Space, here: Machine) -> Iterator[str]:
    """Say where times come from, and loudly what of them is not of this machine, or lies between measurements."""
    table, measured = deployment.latency, deployment.measured
    if table is None or measured is None:
        return
    machine = table.machine
    spread = max((value for values in measured.spread.values() for value in values), default=0.0)
    yield (
        f"latency: {measured.conditions} in {table.precision} on {machine.device} ({machine.name}), "
        f"{machine.threads} threads, torch {machine.torch}; rounds differ by up to {spread:.0%}"
    )
    whole = [one for one in table.checks if one.conditions == measured.conditions]
    worst = max(whole, key=lambda one: abs(one.table_ms / one.clock_ms - 1.0), default=None)
    if worst is not None and abs(worst.table_ms / worst.clock_ms - 1.0) > TRUSTED:
        times = f"{worst.table_ms:.4g} ms by its layers, {worst.clock_ms:.4g} as a whole"
        yield f"warning: {worst.name} took {times}: measure again, on a machine that does nothing else"
    if different := machine.differences(here):
        yield f"warning: latency was not measured on a machine like this one: here {'; '.join(different)}"
    grid = grid_of(space.parent, {axis: own.choices for axis, own in space.axes.items()})
    for axis, widths in grid.items():
        if between := [width for width in widths if width not in table.widths[axis]]:
            yield f"warning: {axis} {_widths(between)}: not measured, interpolated between the widths next to it"


def _widths(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
