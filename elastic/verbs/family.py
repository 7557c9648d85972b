"""Open a checkpoint for evaluation or extraction: its weights, its space, and what its router chose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.read import StoredTensors
from elastic.checkpoint.record import Record, check_same_shape
from elastic.checkpoint.state import Trainable, load_checkpoint, load_router
from elastic.config.serving import MembersConfig, SubnetConfig
from elastic.model.model import ElasticModel, Layout, build_model
from elastic.router.draw import decide
from elastic.router.router import Router
from elastic.space.budget import Budget
from elastic.space.cost import Deployment
from elastic.space.space import Space
from elastic.space.subnet import Subnet
from elastic.world.groups import World


class FamilyError(ValueError):
    """A budget or subnet that the checkpoint does not have."""


@dataclass(frozen=True)
class Member:
    """One named subnet, and the budget it was chosen for (None: given by hand)."""

    name: str
    subnet: Subnet
    budget: Budget | None = None


@dataclass(frozen=True)
class OpenFamily:
    """A checkpoint with the members that were asked for; its weights stay on disk until a method asks for them."""

    checkpoint: Path
    record: Record
    space: Space
    deployment: Deployment
    members: tuple[Member, ...]

    def load_model(self, layout: Layout) -> ElasticModel:
        """Build this rank's part of the nested model and load its weights; process groups must exist."""
        model = build_model(self.space, layout)
        load_checkpoint(self.checkpoint, Trainable(model))
        return model

    def tensors(self) -> StoredTensors:
        """Return the full parameters, each read when asked for; needs no process group."""
        return StoredTensors(self.checkpoint, self.record.shape)


def open_family(
    checkpoint: str,
    router: str | None,
    budget_names: Sequence[str] | None,
    subnets: Sequence[SubnetConfig],
    *,
    full: bool = True,
    world: World | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> OpenFamily:
    """Take weights from `checkpoint`, choices from `router`'s checkpoint (None: the same one).

    `budget_names` None takes all, an empty list none. Weights that come without a router have one member, the whole
    parent. `full`, `world` and `say`: how the checkpoints are verified (checkpoint/find.py). Raises FamilyError for an
    unknown budget, CheckpointError or RecordError for checkpoints that are damaged or do not fit together.
    """
    folder = resolve_checkpoint(checkpoint, full=full, world=world, say=say)
    record = Record.read(folder)
    chooser_folder = folder
    if router is not None:
        chooser_folder = resolve_checkpoint(router, full=full, world=world, say=say)
    chooser = record if router is None else Record.read(chooser_folder)
    check_same_shape(record.shape, chooser.shape, chooser_folder)
    if chooser.depth_ranking != record.depth_ranking or chooser.lanes != record.lanes:
        raise FamilyError(f"{folder} and {chooser_folder} are nested differently; use the same permuted parent")
    space = chooser.space()
    members = [*_budget_members(chooser, chooser_folder, space, budget_names)]
    members += [Member(given.name, given.subnet(space.parent)) for given in subnets]
    names = [member.name for member in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FamilyError(
            f"subnets = {twice}: a budget has that name already; give the subnet another, or leave the budget out "
            f"of budget_names"
        )
    deployment = Deployment() if chooser.family is None else chooser.family.deployment
    return OpenFamily(folder, record, space, deployment, tuple(members))


def open_configured(
    config: MembersConfig, *, world: World | None = None, say: Callable[[str], object] = lambda text: None
) -> OpenFamily:
    """Open what a verb's config names; errors of `open_family`."""
    source, full = config.init_from, config.init_from.verify == "full"
    return open_family(
        source.checkpoint, source.router, config.budget_names, config.subnets, full=full, world=world, say=say
    )


def _budget_members(record: Record, folder: Path, space: Space, wanted: Sequence[str] | None) -> list[Member]:
    if wanted is not None and not wanted:
        return []
    if record.family is None:
        if wanted:
            raise FamilyError(f"budget_names = {list(wanted)}: {folder} has no router; leave them out or name a router")
        return [Member("parent", Subnet.full(space.parent))]
    known = {budget.name: index for index, budget in enumerate(record.family.budgets)}
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise FamilyError(f"budget_names = {unknown}: not in {folder}, which has {list(known)}")
    router = Router(space, len(known), record.family.router_width, seed=0)
    load_router(folder, router)
    return [
        Member(name, decide(router, space, index), record.family.budgets[index])
        for name, index in known.items()
        if wanted is None or name in wanted
    ]
