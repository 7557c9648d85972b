"""Losses and gradients that are not finite: all ranks leave the step out alike and say what caused it.

If any loss, the gradient norm or any gradient of the router is NaN or Inf on any rank, neither weights nor router nor
their Adam states take the step on any rank. The step still counts, so data, draws and schedules go on. After
`max_in_a_row` such steps the run ends with NonFiniteError; a run resumed among bad steps counts from zero again. Steps
in messages and files count from 1, as in metrics.jsonl and in the names of checkpoints.
"""

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.distributed import ReduceOp

from elastic.data.stream import Batch
from elastic.model.initialize import named_global_parameters
from elastic.space.gates import Gates
from elastic.train.pipeline import MicroBatchLoss
from elastic.world.files import write_json
from elastic.world.groups import World

NONFINITE_FOLDER = "nonfinite"
MAX_DUMPS = 20  # files one rank writes in one run; ours
MAX_NAMES = 8


class NonFiniteError(ValueError):
    """A run whose losses or gradients stayed NaN or Inf for more steps in a row than trainer.max_skipped_in_a_row."""


@dataclass
class SkippedSteps:
    """Finds the steps to leave out, writes what they were made of, and ends the run after too many in a row."""

    run_folder: Path
    max_in_a_row: int
    wrapped: DistributedDataParallel
    world: World
    budget_names: Sequence[str]
    in_a_row: list[int] = field(default_factory=list)
    num_dumps: int = 0

    def nonfinite(
        self, losses: Iterable[MicroBatchLoss], norm: Tensor, router_gradients: Sequence[Tensor]
    ) -> list[str]:
        """Name what is not finite on some rank, alike on each: the one wait of a step for the device but Chooser's."""
        kinds: dict[str, Sequence[Tensor]] = {
            "losses": [value for loss in losses for value in (loss.kl, loss.cross_entropy) if value is not None],
            # The norm counts a weight that several ranks hold only once: it cannot speak for the gradients of copies.
            "gradients": [norm, *(torch.linalg.vector_norm(b.grad_data, ord=math.inf) for b in self.wrapped.buffers)],
            "router gradients": router_gradients,
        }
        wrong = torch.zeros(len(kinds), dtype=torch.int32, device=self.world.device)
        for kind, values in zip(wrong, kinds.values(), strict=True):
            if values:
                kind.copy_(torch.cat([value.reshape(-1) for value in values]).isfinite().logical_not().any())
        torch.distributed.all_reduce(wrong, op=ReduceOp.MAX)
        return [kind for kind, count in zip(kinds, wrong.tolist(), strict=True) if count]

    def step_skipped(
        self,
        bad: Sequence[str],
        step: int,
        batches: Sequence[Batch],
        choices: Sequence[Gates | None],
        losses: Sequence[MicroBatchLoss],
        grad_norm: float,
    ) -> None:
        """Note a step with something `bad`; raises NonFiniteError on all ranks once there were too many in a row."""
        self.in_a_row.append(step)
        parts = zip_longest(batches, losses, choices)  # only the last stage has losses
        micro_batches = [self._micro_batch(*of_one) for of_one in parts]
        self._dump(dict(step=step, not_finite=bad, grad_norm=readable(grad_norm), micro_batches=micro_batches))
        if len(self.in_a_row) < self.max_in_a_row:
            return
        # Every rank's file is there before any process ends, which ends the others.
        torch.distributed.barrier()
        raise NonFiniteError(
            f"trainer.max_skipped_in_a_row = {self.max_in_a_row}: reached with steps "
            f"{', '.join(map(str, self.in_a_row))}, whose {' and '.join(bad)} are NaN or Inf. The weights "
            f"took none of these steps, and the last checkpoint is good. What the steps were made of lies in "
            f"{self.run_folder / NONFINITE_FOLDER}. Look at those samples, lower the learning rate or raise "
            "trainer.max_skipped_in_a_row, and run the same command to go on"
        )

    def _micro_batch(self, batch: Batch, loss: MicroBatchLoss | None, gates: Gates | None) -> dict[str, Any]:
        """Return what this rank knows of a micro-batch, ready for JSON; `suspect`: its own numbers are not finite."""
        losses = {} if loss is None else {"kl": loss.kl, "cross_entropy": loss.cross_entropy}
        leaves = {} if gates is None else {axis.value: leaf for axis, leaf in gates.weights.items()}
        wrong = [name for name, leaf in leaves.items() if not _is_finite(leaf.grad)]
        suspect = bool(wrong) or not all(map(_is_finite, losses.values()))
        found: dict[str, Any] = {"suspect": suspect, "sample_ids": batch.sample_ids.tolist()}
        for name, value in losses.items():
            assert loss is not None
            found[name] = None if value is None else readable(float(value) / max(int(loss.num_tokens), 1))
        if gates is None:
            return found
        assert gates.budget is not None, "a drawn choice knows its budget"
        found["budget"] = self.budget_names[gates.budget]
        if gates.subnet is not None:
            return found | {"subnet": asdict(gates.subnet)}
        rows = {name: [[readable(value) for value in row] for row in leaf.tolist()] for name, leaf in leaves.items()}
        return found | {"gates": rows, "nonfinite_gate_gradients": wrong}

    def _dump(self, content: dict[str, Any]) -> None:
        """Write this rank's share of the evidence, if it has any. All ranks must call."""
        world, groups, rank = self.world, self.world.groups, torch.distributed.get_rank()
        suspect = any(micro_batch["suspect"] for micro_batch in content["micro_batches"])
        seen = torch.tensor([int(suspect)], device=world.device)
        torch.distributed.all_reduce(seen, op=ReduceOp.MAX)
        weights = [(name, w) for name, w in named_global_parameters(self.wrapped.module) if w.requires_grad]
        names = [name for name, w in weights if not _is_finite(w.main_grad)]  # type: ignore[attr-defined]  # the wrapper's
        # Gradients are summed over replicas, so a bad one shows in all of them: the first speaks for them. Where no
        # micro-batch shows anything, every replica says which samples it had.
        speaks = bool(names) and world.data_rank == 0
        reads = not seen.item() and world.is_last_stage and groups.tp.rank() == groups.cp.rank() == 0
        if self.num_dumps >= MAX_DUMPS or not (world.is_main or suspect or speaks or reads):
            return
        self.num_dumps += 1
        content |= {
            "rank": rank,
            "host": platform.node(),
            "ranks": dict(
                data=world.data_rank, tensor=groups.tp.rank(), pipeline=groups.pp.rank(), context=groups.cp.rank()
            ),
            "num_nonfinite_gradients": len(names),
            "nonfinite_gradients": names[:MAX_NAMES],
        }
        folder = self.run_folder / NONFINITE_FOLDER
        folder.mkdir(exist_ok=True)
        write_json(folder / f"step_{content['step']:08d}_rank_{rank}.json", content)


def _is_finite(value: Tensor | None) -> bool:
    return value is None or bool(value.isfinite().all())


def readable(value: float) -> float | str:
    """Return a number as JSON has it; NaN and Inf, which JSON has not, as text."""
    return value if math.isfinite(value) else str(value)
