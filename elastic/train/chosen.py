"""What the router of a running training chooses now, per budget."""

from elastic.router.draw import decide
from elastic.space.gates import Execution, Gates
from elastic.space.subnet import Subnet
from elastic.train.trainer import Trainer


def chosen_subnets(trainer: Trainer) -> dict[str, Subnet]:
    """Return the subnet the router now chooses for every budget: argmax, no noise."""
    chooser = trainer.chooser
    if chooser is None:
        return {"parent": Subnet.full(trainer.record.shape)}
    return {budget.name: decide(chooser.router, chooser.space, index) for index, budget in enumerate(chooser.budgets)}


def chosen_gates(trainer: Trainer) -> dict[str, Gates | None]:
    """Return slice-execution gates of every budget; None (the bare model) for a run without budgets."""
    if trainer.chooser is None:
        return {"parent": None}
    subnets = chosen_subnets(trainer)
    return {name: Gates(Execution.SLICE, subnet, budget=index) for index, (name, subnet) in enumerate(subnets.items())}
