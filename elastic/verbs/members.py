"""Open a checkpoint for evaluation, extraction or text: its weights, its space, and the subnets that are asked for."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.contents import CheckpointError
from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.read import StoredTensors
from elastic.checkpoint.record import Record, RecordError, check_same_shape
from elastic.checkpoint.state import Trainable, load_checkpoint, load_router
from elastic.config.inputs import CheckpointInput, ServedInput, SubnetConfig
from elastic.config.load import ConfigError, Problem
from elastic.config.rules_layout import nearest_multiple
from elastic.model.model import ElasticModel, build_model
from elastic.router.decide import decide
from elastic.router.router import Router
from elastic.space.axes import Axis
from elastic.space.cost import Budget, Deployment, Metric, subnet_cost
from elastic.space.reach import choice_indices, out_of_reach, smallest_subnet, subnet_between
from elastic.space.shape import ShapeError, Subnet, SubnetError
from elastic.space.space import Space, SpaceError
from elastic.world.groups import Layout, World

CHECKPOINT_REMEDY = "give a run folder of an earlier verb, or one checkpoint in it"


class MembersError(ConfigError):
    """Budgets or subnets that the checkpoint does not have: all of them."""


@dataclass(frozen=True)
class Member:
    """One named subnet, the budget it was chosen for (None: by hand), and what its training lacks (None: nothing)."""

    name: str
    subnet: Subnet
    budget: Budget | None = None
    untrained: str | None = None


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint with the members that were asked for; its weights stay on disk until a method asks for them.

    `logits` [slots, K] of its router by budget and axis, where a router was read.
    """

    checkpoint: Path
    record: Record
    space: Space
    deployment: Deployment
    members: tuple[Member, ...]
    logits: Mapping[str, Mapping[Axis, torch.Tensor]] = field(default_factory=dict)

    def load_model(self, layout: Layout) -> ElasticModel:
        """Build this rank's part of the nested model and load its weights; process groups must exist."""
        model = build_model(self.space, layout, seed=None)
        load_checkpoint(self.checkpoint, Trainable(model))
        return model

    def tensors(self) -> StoredTensors:
        """Return the full parameters, each read when asked for; needs no process group."""
        return StoredTensors(self.checkpoint, self.record.shape)


def open_checkpoint(
    source: ServedInput,
    budget_names: Sequence[str] | None,
    subnets: Sequence[SubnetConfig],
    *,
    full: bool | None = None,
    world: World | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> OpenCheckpoint:
    """Take weights from `source.checkpoint`, choices from `source.router`'s checkpoint (None: the same one).

    `budget_names` None takes all, an empty list none. Weights that come without a router have one member, the whole
    parent. `full` (None: as `source.verify` says), `world` and `say`: how the checkpoints are verified
    (checkpoint/find.py). Raises MembersError with every budget and subnet that cannot be taken, CheckpointError or
    RecordError for checkpoints that are damaged or do not fit together.
    """
    assert source.checkpoint is not None, "the rules of the config let nothing without weights through"
    full = source.verify == "full" if full is None else full
    folder = chooser_folder = resolve_checkpoint(source.checkpoint, full=full, world=world, say=say)
    record = chooser = Record.read(folder)
    if source.router is not None:
        chooser_folder = resolve_checkpoint(source.router, full=full, world=world, say=say)
        chooser = Record.read(chooser_folder)
        check_same_shape(record.shape, chooser.shape, chooser_folder)
    if chooser.depth_ranking != record.depth_ranking or chooser.lanes != record.lanes:
        rule = f"{folder} and {chooser_folder} are nested differently"
        raise MembersError([Problem("init_from.router", source.router, rule, "use the same permuted parent")])
    space, family, deployment = chooser.space(), chooser.family, Deployment()
    chosen: dict[str, Member] = {}
    logits: dict[str, Mapping[Axis, torch.Tensor]] = {}
    if family is not None:
        deployment = family.deployment
        if budget_names is None or budget_names or subnets:
            router = Router(space, len(family.budgets), family.router_width, seed=0)
            load_router(chooser_folder, router)
            values = {axis: own.detach() for axis, own in router().items()}
            for index, budget in enumerate(family.budgets):
                logits[budget.name] = {axis: own[index] for axis, own in values.items()}
                subnet = decide(router, space, index, budget, deployment)
                chosen[budget.name] = Member(budget.name, subnet, budget, _untrained(record, subnet, by_hand=False))
    problems = list(_unknown_budgets(budget_names, list(chosen), chooser_folder))
    wanted = chosen if budget_names is None else dict.fromkeys(budget_names)
    members = [chosen[name] for name in wanted if name in chosen]
    if not chosen and budget_names is None:
        members = [Member("parent", Subnet.full(space.parent))]
    taken = {member.name for member in members}
    for index, given in enumerate(subnets):
        found = _given_subnet(f"subnets.{index}", given, space, list(chosen.values()), deployment)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            members.append(Member(given.name, found, None, _untrained(record, found, by_hand=True)))
        if given.name in taken:
            remedy = "give the subnet another, or leave the budget out of budget_names"
            problems.append(Problem(f"subnets.{index}.name", given.name, "a budget has that name already", remedy))
    if problems:
        raise MembersError(problems)
    return OpenCheckpoint(folder, record, space, deployment, tuple(members), logits)


def members_problems(
    source: ServedInput,
    budget_names: Sequence[str] | None,
    subnets: Sequence[SubnetConfig],
    *,
    masked: bool = False,
) -> Iterator[Problem]:
    """Yield what `open_checkpoint` would raise where `source_problems` yields nothing; of tensors, reads the router's.

    `masked`: a problem, too, for the first member that full-size masks cannot run.
    """
    try:
        opened = open_checkpoint(source, budget_names, subnets, full=False)
        for member in opened.members if masked else ():
            one_hot_weights(member.subnet, opened.space)
    except MembersError as error:
        yield from error.problems
    except (CheckpointError, RecordError) as error:
        yield Problem("init_from.router", source.router, str(error), CHECKPOINT_REMEDY)


def sources(init_from: CheckpointInput) -> list[tuple[str, str]]:
    """List (field, path) of the checkpoints that a verb starts from, as far as they are given."""
    given = {entry.name: getattr(init_from, entry.name) for entry in fields(init_from)}
    paths = {name: value for name, value in given.items() if name not in ("verify", "subnets")}
    return [(f"init_from.{name}", path) for name, path in paths.items() if path is not None]


def source_problems(init_from: CheckpointInput) -> Iterator[Problem]:
    """Yield a problem for every checkpoint that cannot be opened; sizes only: the verb itself looks at checksums."""
    for name, path in sources(init_from):
        try:
            Record.read(resolve_checkpoint(path))
        except (CheckpointError, RecordError) as error:
            yield Problem(name, path, str(error), CHECKPOINT_REMEDY)


def subnet_summary(subnet: Subnet) -> dict[str, Any]:
    """Return a subnet as plain JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(subnet).items()}


def one_hot_weights(subnet: Subnet, space: Space, device: torch.device | None = None) -> dict[Axis, torch.Tensor]:
    """Return exact one-hot weights [slots, K] of a subnet of this space; raises MembersError for one outside it."""
    try:
        chosen = choices_of(space, subnet)
    except SpaceError as error:
        raise MembersError([Problem("execution", "mask", str(error), "use execution=slice")]) from error
    return {
        axis: torch.nn.functional.one_hot(torch.tensor(indices, device=device), len(space.axes[axis].choices)).float()
        for axis, indices in chosen.items()
    }


def choices_of(space: Space, subnet: Subnet) -> dict[Axis, tuple[int, ...]]:
    """Return the choices that make exactly this subnet; raises SpaceError for one that a router cannot choose."""
    chosen = choice_indices(space, subnet)
    reached = space.subnet(chosen)
    if reached.kept_layers != subnet.kept_layers or reached.shape(space.parent) != subnet.shape(space.parent):
        raise SpaceError(f"the choices of this checkpoint do not reach {subnet_summary(subnet)}")
    return chosen


def _unknown_budgets(wanted: Sequence[str] | None, known: Sequence[str], folder: Path) -> Iterator[Problem]:
    unknown = [name for name in wanted or () if name not in known]
    if unknown and not known:
        rule = f"{folder} has no router"
        yield Problem("budget_names", unknown, rule, "leave them out or name a router with init_from.router")
    elif unknown:
        near = ", ".join(difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0] for name in unknown)
        yield Problem("budget_names", unknown, f"not in {folder}, which has {', '.join(known)}", f"nearest: {near}")


def _given_subnet(
    field: str, given: SubnetConfig, space: Space, budgets: Sequence[Member], deployment: Deployment
) -> Subnet | Problem:
    """Return a subnet given by its widths or by its parameters, or why the checkpoint has none such."""
    if given.params is not None:
        return _solved(f"{field}.params", given, space, budgets, deployment)
    try:
        subnet = given.subnet(space.parent)
    except (SubnetError, ShapeError) as error:
        return Problem(field, given.name, str(error), "a width that is left out stays full")
    if any(width % space.lanes for width in subnet.ffn):
        legal = sorted({nearest_multiple(width, space.lanes) for width in subnet.ffn}, reverse=True)
        rule = f"widths must be multiples of the lanes = {space.lanes}"
        return Problem(f"{field}.ffn", list(given.ffn or ()), rule, f"nearest legal is {legal}")
    return subnet


def _solved(
    field: str, given: SubnetConfig, space: Space, budgets: Sequence[Member], deployment: Deployment
) -> Subnet | Problem:
    """Find a subnet of so many parameters on the way from the next larger budget to the next smaller one."""
    params = given.params
    assert params is not None
    if given != SubnetConfig(name=given.name, params=params):
        remedy = f"set {field}=null or leave the widths out"
        return Problem(field, params, "widths are given beside it", remedy)
    if not budgets:
        rule, remedy = "needs a router, whose budgets lie around it", "give the widths, or name init_from.router"
        return Problem(field, params, rule, remedy)
    wanted = Budget(given.name, Metric.PARAMS, float(params))
    if (why := out_of_reach(space, wanted, deployment)) is not None:
        return Problem(field, params, *why)
    ends = [Subnet.full(space.parent), *(member.subnet for member in budgets), smallest_subnet(space)]
    sizes = [(int(subnet_cost(space.parent, subnet, deployment).params), subnet) for subnet in ends]
    larger = min((pair for pair in sizes if pair[0] >= params), key=lambda pair: pair[0], default=sizes[0])
    smaller = max((pair for pair in sizes if pair[0] <= params), key=lambda pair: pair[0], default=sizes[-1])
    return subnet_between(space, larger[1], smaller[1], wanted, deployment).subnet


def _untrained(record: Record, subnet: Subnet, *, by_hand: bool) -> str | None:
    """Say what the weights lack for a subnet; None where training aimed at it, or where it is all there is."""
    if subnet == Subnet.full(record.shape):
        return None
    if record.kind == "elastic":
        return "given by hand: no budget of the family was trained at these widths" if by_hand else None
    order = "" if record.kind == "permuted_parent" else ", whose channels are in no order of importance"
    return f"cut from a {record.kind.replace('_', ' ')}{order}, and never trained at this size"
