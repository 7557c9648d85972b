"""Going on from a trained family in a run of its own: its weights and router, and what new budgets start with."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import load_router
from elastic.config.load import Problem, show
from elastic.config.verbs import CostConfig, ElasticConfig
from elastic.router.router import Router
from elastic.router.start import start_at
from elastic.space.axes import Axis
from elastic.space.cost import Budget, subnet_cost
from elastic.space.shape import ShapeError, SubnetError
from elastic.space.space import Space, SpaceError
from elastic.verbs.members import choices_of
from elastic.world.groups import World


def family_checkpoint(config: ElasticConfig, here: World, say: Callable[[str], object]) -> Path | None:
    """Return the checkpoint of the family that a run goes on from, verified as the config says; None: from none."""
    source = config.init_from
    if source.family is None:
        return None
    return resolve_checkpoint(source.family, full=source.verify == "full", world=here, say=say)


def begin_router(router: Router, config: ElasticConfig, space: Space, family: Path | None) -> None:
    """Load the family's router, by the names of its budgets, and start new budgets with their subnets.

    All ranks call this, with the router on the device that their groups exchange, and leave with rank 0's values.
    Raises RouterError for a subnet it cannot hold.
    """
    names = [budget.name for budget in config.elastic.budgets]
    if family is not None:
        load_router(family, router, None, (_budgets(Record.read(family)), names))
    for given in config.init_from.subnets:
        start_at(router, names.index(given.name), choices_of(space, given.subnet(space.parent)))
    for parameter in router.parameters():
        torch.distributed.broadcast(parameter.data, src=0)


def start_problems(config: ElasticConfig | CostConfig, parent: Record) -> Iterator[Problem]:
    """Yield what keeps a run from going on from its family, or a new budget from starting with its subnet."""
    source, trained = config.init_from, dict[str, Budget]()
    if source.family is None and not source.subnets:
        return
    try:
        space = config.space(parent.depth_ranking)
    except SpaceError:  # the rules of the config say so
        return
    if source.family is not None:
        record = Record.read(resolve_checkpoint(source.family))
        trained = {} if record.family is None else {budget.name: budget for budget in record.family.budgets}
        yield from _family_problems(config, space, parent, record)
        yield from _moved_budgets(config, trained)
    deployment, budgets = config.elastic.deployment, {budget.name: budget for budget in config.budgets()}
    for index, given in enumerate(source.subnets):
        field, budget = f"init_from.subnets.{index}", budgets.get(given.name)
        if budget is None or budget.target is None or given.params is not None:
            continue  # likewise
        if given.name in trained:
            rule = "the family was trained for this budget, and goes on with its own choice"
            yield Problem(f"{field}.name", given.name, rule, "leave the subnet out, or name a new budget")
            continue
        try:
            subnet = given.subnet(space.parent)
            choices_of(space, subnet)
        except (SubnetError, ShapeError, SpaceError) as error:
            yield Problem(
                field, given.name, str(error), "give widths among the choices, or what recipes/search.py wrote"
            )
            continue
        cost = subnet_cost(space.parent, subnet, deployment)
        if abs(float(cost[budget.metric]) / budget.limit - 1.0) > budget.tolerance:
            number = [one.name for one in config.elastic.budgets].index(given.name)
            asked = config.elastic.budgets[number]  # a rate is a time by now, but not where it is written
            used, limit = float(cost[asked.metric]), budget.limit if asked.target is None else asked.target
            rule = f"its subnet uses {used:.10g} {asked.metric}, and the router would move it to {limit:.10g}"
            yield Problem(f"elastic.budgets.{number}.target", limit, rule, f"set target={used:.10g}, ratio=null")


def _family_problems(
    config: ElasticConfig | CostConfig, space: Space, parent: Record, record: Record
) -> Iterator[Problem]:
    """The family is one of the same parent, over the same choices."""
    name, path = "init_from.family", config.init_from.family
    if record.family is None:
        yield Problem(name, path, f"holds a {record.kind}, without a router", "give a run of recipes/train_elastic.py")
        return
    if (record.shape, record.lanes, record.depth_ranking) != (parent.shape, parent.lanes, parent.depth_ranking):
        rule = "was trained from another permuted parent than init_from.permuted_parent"
        yield Problem(name, path, rule, f"give {record.provenance.get('permuted parent', 'that one')}")
        return
    theirs = record.space()
    for axis in Axis:
        if theirs.axes[axis] != space.axes[axis]:
            choices = list(theirs.axes[axis].choices)
            rule = f"the family's router chooses among {choices}, per_layer = {show(theirs.axes[axis].per_layer)}"
            value = list(space.axes[axis].choices)
            yield Problem(f"elastic.space.{axis}.choices", value, rule, "set what the family was trained with")
    same_depths = theirs.axes[Axis.DEPTH] == space.axes[Axis.DEPTH]
    if same_depths and not torch.equal(theirs.depth_table(), space.depth_table()):
        asked, keep = dict(config.elastic.space.keep_at_least), dict(record.family.keep_at_least)
        rule = f"the family's depths keep other layers, its keep_at_least is {show(keep)}"
        yield Problem("elastic.space.keep_at_least", asked, rule, "set what the family was trained with")
    width = config.elastic.router.hidden_width
    if width != record.family.router_width:
        rule = f"the family's router has {record.family.router_width}"
        yield Problem(
            "elastic.router.hidden_width", width, rule, f"nearest legal value is {record.family.router_width}"
        )


def _moved_budgets(config: ElasticConfig | CostConfig, trained: Mapping[str, Budget]) -> Iterator[Problem]:
    """A budget that was trained is asked for as it was where the router stays frozen: it has learnt no other choice."""
    if not isinstance(config, ElasticConfig) or not all(phase.router_frozen for phase in config.curriculum):
        return
    for index, budget in enumerate(config.budgets()):
        if budget.target is None or (before := trained.get(budget.name)) is None or budget.asks_as(before):
            continue
        rule = f"the family was trained for {before}, and no phase is left in which the router could learn another"
        remedy = f"set metric={before.metric}, target={before.limit:.10g}, ratio=null, tolerance={before.tolerance:g}"
        remedy += ", or name a new budget, or add a phase with router_frozen=false"
        yield Problem(f"elastic.budgets.{index}", str(budget), rule, remedy)


def _budgets(record: Record) -> list[str]:
    return [] if record.family is None else [budget.name for budget in record.family.budgets]
