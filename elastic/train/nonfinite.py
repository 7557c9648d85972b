"""Losses and gradients that are not finite: all ranks leave the step out alike, count it, and say what caused it.

The rule: if any loss, the gradient norm or any gradient of the router is NaN or Inf on any rank, neither weights nor
router nor their Adam states take the step on any rank. The step still counts, so data, draws and schedules go on. After
`max_in_a_row` such steps the run ends with NonFiniteError. The count in a row is not in a checkpoint: a run that is
resumed among bad steps counts from zero again.

Steps in messages and files count from 1, as in metrics.jsonl and in the names of checkpoints.
"""

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.data.stream import Batch
from elastic.model.initialize import named_global_parameters
from elastic.model.model import ElasticModel
from elastic.router.draw import Draw
from elastic.space.gates import Gates
from elastic.train.pipeline import MicroBatchLoss
from elastic.world.files import write_json
from elastic.world.groups import World

NONFINITE_FOLDER = "nonfinite"
MAX_DUMPS = 20  # files one rank writes in one run; ours
MAX_NAMES = 8


class NonFiniteError(ValueError):
    """A run whose losses or gradients stayed NaN or Inf for more steps in a row than trainer.max_skipped_in_a_row."""


@dataclass(frozen=True)
class Finite:
    """What of one step is finite, over all ranks together."""

    losses: bool
    gradients: bool
    router_gradients: bool

    def __bool__(self) -> bool:
        return self.losses and self.gradients and self.router_gradients

    def found(self) -> list[str]:
        """Name what is not finite."""
        named = {"losses": self.losses, "gradients": self.gradients, "router gradients": self.router_gradients}
        return [name for name, fine in named.items() if not fine]


@dataclass(frozen=True)
class StepParts:
    """What one step was made of on this rank, for the file that explains a bad one."""

    step: int
    batches: Sequence[Batch]
    draw: Draw | None
    losses: Sequence[MicroBatchLoss]
    grad_norm: float
    model: ElasticModel
    budget_names: Sequence[str]


def finite_on_all_ranks(
    losses: Iterable[MicroBatchLoss], gradients: Sequence[Tensor | float], router: nn.Module | None, world: World
) -> Finite:
    """Tell what is finite on all ranks, the same answer on each. Waits for the device: three numbers a step.

    `gradients` are numbers that are not finite where a gradient is not: the norm, the largest ones. `router` None: it
    does not train in this step.
    """
    reported = [value for loss in losses for value in (loss.kl, loss.cross_entropy) if value is not None]
    of_router = [] if router is None else [p.grad for p in router.parameters() if p.grad is not None]
    wrong = torch.stack([_num_nonfinite(values, world) for values in (reported, gradients, of_router)])
    torch.distributed.all_reduce(wrong, op=torch.distributed.ReduceOp.MAX)
    bad_losses, bad_gradients, bad_router = wrong.tolist()
    return Finite(not bad_losses, not bad_gradients, not bad_router)


def _num_nonfinite(values: Iterable[Tensor | float], world: World) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=world.device)
    for value in values:
        total = total + torch.as_tensor(value, device=world.device).isfinite().logical_not().sum()
    return total


@dataclass
class SkippedSteps:
    """Counts the steps that were left out, writes what they were made of, and ends the run after too many."""

    run_folder: Path
    max_in_a_row: int
    count: int = 0
    in_a_row: list[int] = field(default_factory=list)
    num_dumps: int = 0

    def step_taken(self) -> None:
        """Note that a step was fine."""
        self.in_a_row.clear()

    def step_skipped(self, finite: Finite, parts: StepParts, world: World) -> None:
        """Note a bad step; raises NonFiniteError on all ranks once there were too many in a row."""
        self.count += 1
        self.in_a_row.append(parts.step)
        self._dump(finite, parts, world)
        if len(self.in_a_row) < self.max_in_a_row:
            return
        # Every rank's file is there before any process ends, which ends the others.
        torch.distributed.barrier()
        raise NonFiniteError(
            f"trainer.max_skipped_in_a_row = {self.max_in_a_row}: reached with steps "
            f"{', '.join(map(str, self.in_a_row))}, whose {' and '.join(finite.found())} are NaN or Inf. The weights "
            f"took none of these steps, and the last checkpoint is good. What the steps were made of lies in "
            f"{self.run_folder / NONFINITE_FOLDER}. Look at those samples, lower the learning rate or raise "
            "trainer.max_skipped_in_a_row, and run the same command to go on"
        )

    def _dump(self, finite: Finite, parts: StepParts, world: World) -> None:
        """Write this rank's share of the evidence, if it has any. All ranks must call."""
        suspects = [suspect(parts, index) for index in range(len(parts.batches))]
        seen = torch.tensor([int(any(suspects))], device=world.device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        names = nonfinite_gradients(parts.model)
        # Gradients are summed over replicas, so a bad one shows in all of them: the first speaks for them. Where no
        # micro-batch shows anything, every replica says which samples it had.
        speaks = bool(names) and world.data_rank == 0
        reads = not seen.item() and world.is_last_stage and world.groups.tp.rank() == world.groups.cp.rank() == 0
        if self.num_dumps >= MAX_DUMPS or not (world.is_main or any(suspects) or speaks or reads):
            return
        self.num_dumps += 1
        folder = self.run_folder / NONFINITE_FOLDER
        folder.mkdir(exist_ok=True)
        rank = torch.distributed.get_rank()
        write_json(folder / f"step_{parts.step:08d}_rank_{rank}.json", evidence(finite, parts, suspects, names, world))


def suspect(parts: StepParts, index: int) -> bool:
    """Tell whether a micro-batch's own loss or gate gradients are not finite on this rank."""
    values: list[Tensor] = []
    if parts.losses:
        loss = parts.losses[index]
        values += [value for value in (loss.kl, loss.cross_entropy) if value is not None]
    if parts.draw is not None:
        values += [leaf.grad for leaf in parts.draw.gates[index].weights.values() if leaf.grad is not None]
    return not all(bool(value.isfinite().all()) for value in values)


def nonfinite_gradients(model: ElasticModel) -> list[str]:
    """Name the parameters of this rank whose gradient, summed over replicas, is not finite."""
    return [
        name
        for name, parameter in named_global_parameters(model)
        if parameter.requires_grad and not bool(parameter.main_grad.isfinite().all())  # type: ignore[attr-defined]  # the wrapper's
    ]


def evidence(
    finite: Finite, parts: StepParts, suspects: Sequence[bool], names: Sequence[str], world: World
) -> dict[str, Any]:
    """Return what is known of a bad step on this rank, ready for JSON."""
    groups = world.groups
    return {
        "step": parts.step,
        "not_finite": finite.found(),
        "rank": torch.distributed.get_rank(),
        "host": platform.node(),
        "ranks": {
            "data": world.data_rank,
            "tensor": groups.tp.rank(),
            "pipeline": groups.pp.rank(),
            "context": groups.cp.rank(),
        },
        "grad_norm": readable(parts.grad_norm),
        "num_nonfinite_gradients": len(names),
        "nonfinite_gradients": list(names[:MAX_NAMES]),
        "micro_batches": [_of_micro_batch(parts, index, suspects[index]) for index in range(len(parts.batches))],
    }


def _of_micro_batch(parts: StepParts, index: int, is_suspect: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"suspect": is_suspect, "sample_ids": parts.batches[index].sample_ids.tolist()}
    if parts.losses:
        loss = parts.losses[index]
        for name, value in (("kl", loss.kl), ("cross_entropy", loss.cross_entropy)):
            content[name] = None if value is None else readable(float(value) / max(int(loss.num_tokens), 1))
    if parts.draw is not None:
        gates = parts.draw.gates[index]
        assert gates.budget is not None, "a drawn choice knows its budget"
        content |= {"budget": parts.budget_names[gates.budget], **_choice(gates)}
    return content


def _choice(gates: Gates) -> dict[str, Any]:
    if gates.subnet is not None:
        return {"subnet": asdict(gates.subnet)}
    leaves = {axis.value: leaf for axis, leaf in gates.weights.items()}
    return {
        "gates": {name: [[readable(value) for value in row] for row in leaf.tolist()] for name, leaf in leaves.items()},
        "nonfinite_gate_gradients": [
            name for name, leaf in leaves.items() if leaf.grad is not None and not bool(leaf.grad.isfinite().all())
        ],
    }


def readable(value: float) -> float | str:
    """Return a number as JSON has it; NaN and Inf, which JSON has not, as text."""
    return value if math.isfinite(value) else str(value)
