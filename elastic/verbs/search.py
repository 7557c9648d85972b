"""The verb search: sizes that were not trained, between and around the budgets of a family, priced and scored."""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elastic.blend.sources import open_held_out, open_sources
from elastic.config.latency import latency_notes, table_problems
from elastic.config.load import ConfigError, Problem
from elastic.config.sections import DistillConfig
from elastic.config.verbs import SearchConfig
from elastic.data.held_out import HeldOut
from elastic.run.folder import open_run_folder
from elastic.run.world import run_world
from elastic.search.candidates import Candidates, likelihood, pick, propose
from elastic.search.constraint import ConstraintError, met, metric_values, reach_problems, read_constraint
from elastic.search.front import GIVEN, TRAINED, Scored, above_line, draw_front, pareto_front
from elastic.space.cost import Metric, subnet_cost
from elastic.space.gates import Gates
from elastic.space.latency import LatencyTable, Machine
from elastic.space.shape import Subnet
from elastic.space.space import Space, SpaceError
from elastic.train.evaluation import evaluate_subnets
from elastic.train.pipeline import PipelineRunner
from elastic.verbs.cost import quantity
from elastic.verbs.members import OpenCheckpoint, choices_of, open_checkpoint, subnet_summary
from elastic.verbs.report_file import print_table, table
from elastic.verbs.subnet_file import write_subnets
from elastic.world.files import write_json
from elastic.world.groups import World

SEARCH_FILE, SUBNETS_FILE, PICTURE_FILE = "search.json", "subnets.json", "front.png"
LOSS = "held-out loss"
Score = Callable[[PipelineRunner, Gates, HeldOut], float]


class SearchError(ConfigError):
    """A checkpoint without a family, or a score that cannot be had."""


def run_search(config: SearchConfig, console: Console) -> Path:
    """Search and write search.json, subnets.json and front.png; returns the run folder.

    Raises SearchError, or ConstraintError where no subnet meets the constraint, before a model is built.
    """
    held_out = open_sources(config.data, "validation")
    own_score = None if config.score is None else load_score(config.score)
    with run_world(config) as here:
        opened = open_checkpoint(config.init_from, config.budget_names, config.subnets, world=here, say=console.print)
        opened, metric = priced(opened, config.latency), search_metric(config)
        candidates, num_met, picked = find(config, opened, metric)
        subnets = {one.name: (one.subnet, GIVEN if one.budget is None else TRAINED) for one in opened.members}
        # An earlier search's may be scored again, or be budgets by now.
        free = (name for number in count(1) if (name := f"s{number:02d}") not in subnets)
        for row, name in zip(picked, free, strict=False):
            subnets[name] = candidates.subnet(row), candidates.origins[row]
        with open_run_folder(config.exp_manager, asdict(config), here) as folder:
            data, first = open_held_out(config.data, held_out, config.sequence_length), dict[Hashable, str]()
            same = {name: first.setdefault(_cut(opened, subnet), name) for name, (subnet, _) in subnets.items()}
            gates = {name: Gates.slice(subnets[name][0]) for name in first.values()}
            scores = _scores(config, opened, here, gates, own_score, data)
            members = []
            for name, (subnet, origin) in subnets.items():
                cost = subnet_cost(opened.space.parent, subnet, opened.deployment)
                members.append(Scored(name, subnet, cost, float(cost[metric]), scores[same[name]], origin))
            members.sort(key=lambda one: (-one.used, one.name))
            if here.is_main:
                for line in latency_notes(opened.deployment, opened.space, Machine.here()):
                    console.print(line, markup=False, highlight=False)
                for name, other in same.items():
                    if name != other:
                        console.print(f"{name} is the subnet of {other}: scored once", markup=False, highlight=False)
                _leave(config, opened, members, (len(candidates), num_met), folder, console)
    return folder


def priced(opened: OpenCheckpoint, table: LatencyTable | None) -> OpenCheckpoint:
    """Return the checkpoint with times of `table` in its deployment, whose pass, batch and length stay; None: as is."""
    return opened if table is None else replace(opened, deployment=replace(opened.deployment, latency=table))


def _cut(opened: OpenCheckpoint, subnet: Subnet) -> Hashable:
    """Return what is the same of equal submodels: widths of layers that do not run say nothing."""
    return subnet.kept_layers, subnet.shape(opened.space.parent)


def _leave(
    config: SearchConfig,
    opened: OpenCheckpoint,
    members: list[Scored],
    counts: tuple[int, int],
    folder: Path,
    console: Console,
) -> None:
    """Write and print what was found."""
    metric, score_name = search_metric(config), config.score or LOSS
    report = _report(config, opened, members, counts)
    write_json(folder / SEARCH_FILE, report)
    found = {one.name: one.subnet for one in members if one.origin not in (TRAINED, GIVEN)}
    write_subnets(folder / SUBNETS_FILE, opened.checkpoint, found)
    draw_front(members, metric, score_name, folder / PICTURE_FILE)
    limited = [limit.metric for limit in read_constraint(config.constraint)]
    print_table(search_table(members, (metric, *limited), score_name), console)
    console.print(summary(report), highlight=False, markup=False)
    console.print(f"written: {folder / SUBNETS_FILE}   picture: {folder / PICTURE_FILE}", highlight=False)


def search_metric(config: SearchConfig) -> Metric:
    """Return what sizes are compared by: the metric of the first limit, of a rate its time, else parameters.

    So a smaller number is cheaper, whatever the metric.
    """
    limits = read_constraint(config.constraint)
    metric = limits[0].metric if limits else Metric.PARAMS
    return Metric.LATENCY_MS if metric is Metric.TOKENS_PER_S else metric


def find(config: SearchConfig, opened: OpenCheckpoint, metric: Metric) -> tuple[Candidates, int, list[int]]:
    """Return the candidates, how many of them meet the constraint, and which are to be scored."""
    trained = {one.name: one.subnet for one in opened.members if one.budget is not None}
    given = [one.subnet for one in opened.members if one.budget is None and _in_choices(opened.space, one.subnet)]
    candidates = propose(opened.space, trained, opened.logits, config.num_priced, config.seed, given)
    if not len(candidates):
        rule = f"the choices of {opened.checkpoint} have no subnet beside the trained ones"
        raise SearchError([Problem("init_from.checkpoint", str(opened.checkpoint), rule, "train with more choices")])
    costs = candidates.cost(opened.deployment)
    allowed = met(config.constraint, read_constraint(config.constraint), costs, len(candidates))
    used = metric_values(costs, metric, len(candidates))
    prices = {
        name: float(subnet_cost(opened.space.parent, subnet, opened.deployment)[metric])
        for name, subnet in trained.items()
    }
    likely = likelihood(candidates, used, [(prices[name], opened.logits[name]) for name in trained])
    return candidates, int(allowed.sum()), pick(used, likely, allowed, config.num_scored)


def _in_choices(space: Space, subnet: Subnet) -> bool:
    try:
        choices_of(space, subnet)
    except SpaceError:
        return False
    return True


def search_problems(config: SearchConfig) -> Iterator[Problem]:
    """Yield what is wrong with a search of members that can be opened: no budgets, the constraint, the score."""
    opened = open_checkpoint(config.init_from, config.budget_names, config.subnets, full=False)
    opened = priced(opened, config.latency)
    if config.latency is not None:
        space = opened.space
        wrong = tuple(table_problems("latency", config.latency, opened.deployment, space.parent, space.axes))
        yield from wrong
        if wrong:
            return
    if not any(member.budget is not None for member in opened.members):
        rule = "a search lies between and around trained budgets, and none is taken"
        yield Problem(
            "budget_names", config.budget_names, rule, "give a run of train_elastic, and null for all its budgets"
        )
    try:
        yield from reach_problems(config.constraint, opened.space, opened.deployment)
        if config.score is not None:
            load_score(config.score)
    except (ConstraintError, SearchError) as error:
        yield from error.problems


def load_score(path: str) -> Score:
    """Import a function by its path, package.module.function; raises SearchError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        function = vars(import_module(module))[name]
    except (ImportError, ValueError, KeyError) as error:
        rule = f"cannot be imported ({type(error).__name__}: {error})"
        remedy = "write package.module.function, with the package on PYTHONPATH"
        raise SearchError([Problem("score", path, rule, remedy)]) from error
    if not callable(function):
        raise SearchError([Problem("score", path, "is no function", "name a function of (runner, gates, data)")])
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        rule = f"takes other arguments ({error})"
        raise SearchError([Problem("score", path, rule, "name a function of (runner, gates, data)")]) from error
    except ValueError:  # of C, and says nothing of its arguments
        pass
    return function


def _scores(
    config: SearchConfig,
    opened: OpenCheckpoint,
    here: World,
    gates: dict[str, Gates],
    own_score: Score | None,
    data: HeldOut,
) -> dict[str, float]:
    """Return the score of every choice, the same on all ranks; raises SearchError for what is no number."""
    runner = PipelineRunner(here, opened.load_model(here.layout), DistillConfig(kl_weight=0.0))
    found: dict[str, Any]
    if own_score is None:
        losses = evaluate_subnets(runner, gates, data, config.data.validation_sequences, config.data.micro_batch)
        found = {name: loss.mean.cross_entropy for name, loss in losses.items()}
    else:
        found = {name: own_score(runner, choice, data) for name, choice in gates.items()}
    for name, value in found.items():
        if not isinstance(value, float | int) or not torch.tensor(float(value)).isfinite():
            rule = f"of {name} it is {value!r}, which is no finite number"
            raise SearchError(
                [Problem("score", config.score or LOSS, rule, "a lower number must mean a better subnet")]
            )
    return {name: float(value) for name, value in found.items()}


def _report(
    config: SearchConfig, opened: OpenCheckpoint, members: list[Scored], counts: tuple[int, int]
) -> dict[str, Any]:
    front = {one.name for one in pareto_front(members)}
    return {
        "checkpoint": str(opened.checkpoint),
        "constraint": config.constraint,
        "metric": search_metric(config).value,
        "score": config.score or LOSS,
        "num_priced": counts[0],
        "num_met": counts[1],
        "members": [
            {
                "name": one.name,
                "origin": one.origin,
                **{metric.value: getattr(one.cost, metric.value) for metric in Metric},
                "score": one.score,
                "above_line": above_line(one, members),
                "on_front": one.name in front,
                "subnet": subnet_summary(one.subnet),
            }
            for one in members
        ],
    }


def search_table(members: list[Scored], metrics: Sequence[Metric], score_name: str) -> Table:
    """Render what was scored, largest first: parameters, and `metrics`."""
    front, shown = {one.name for one in pareto_front(members)}, tuple(dict.fromkeys((Metric.PARAMS, *metrics)))
    rows = []
    for one in members:
        above = None if one.is_trained else above_line(one, members)
        cells = [one.name, one.origin, *(quantity(name, float(one.cost[name])) for name in shown), f"{one.score:.4f}"]
        rows.append([*cells, "-" if above is None else f"{above:+.4f}", "*" if one.name in front else ""])
    headings = ("name", "from", *(name.value for name in shown), score_name, "above line", "front")
    return table("sizes between and around the trained budgets", headings, rows)


def summary(report: dict[str, Any]) -> str:
    """Say how many were priced and scored, and how far the untrained lie above the line between trained budgets."""
    untrained = [row for row in report["members"] if row["origin"] not in (TRAINED, GIVEN)]
    text = f"{report['num_priced']:,} priced, {report['num_met']:,} meet {report['constraint'] or 'no constraint'}, "
    text += f"{len(untrained)} scored"
    above = [row["above_line"] for row in untrained if row["above_line"] is not None]
    if not above:
        return f"{text}; none lies between two trained budgets"
    mean, most = sum(above) / len(above), max(above)
    return (
        f"{text}\n{len(above)} of them lie between trained budgets, {mean:+.4f} from the line between their neighbours "
        f"on the mean, {min(above):+.4f} to {most:+.4f}: above it, training at that size would gain"
    )
