"""debug.sanity: what has to be equal on several ranks is equal, bit for bit, before and after a step.

Fingerprints, never tensors, travel between ranks. Compared are

    over data- and context-parallel ranks   every weight, its fp32 main weight and Adam state
    over tensor-parallel ranks              of those, what is not sharded
    over first and last pipeline stage      a tied embedding
    over all ranks                          router weights and their Adam state, seed, step, data position, the budgets
                                            drawn for the step
    over the ranks of one replica           the gates and sample ids of each micro-batch

and every rank with itself: between two steps nothing may change. That tells which of two copies is wrong, and is all
that can be said of the parts of a distributed optimizer, which have no copies. Everything random follows from (seed,
step, micro-batch) and reaches the model as gates: it is compared by its seed and by what was drawn.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from elastic.checkpoint.state import Trainable
from elastic.data.stream import Batch
from elastic.model.initialize import named_global_parameters
from elastic.model.sharding import sharded_dim
from elastic.router.phases import Moment
from elastic.space.gates import Gates
from elastic.world.files import first_few
from elastic.world.groups import World

EMBEDDING = "weight embedding.word_embeddings.weight"
COPIED = ("weight ", "main weight ", "Adam ")  # what a replica has a copy of
MAX_SHOWN = 5
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, its bits without a pattern; as a signed number
_CHUNK = 1 << 22  # values at a time, so that the 64-bit copies stay small beside a large embedding


class SanityError(ValueError):
    """Copies that should be equal and are not, or weights that changed between two steps."""


@dataclass
class Sanity:
    """Compares the copies around every nth step; every method is called by all ranks. Waits for the device."""

    trained: Trainable
    world: World
    seed: int
    every_n_steps: int = 1
    _left: Mapping[str, int] = field(default_factory=dict)
    _left_after_step: int | None = None

    def before_step(
        self, moment: Moment, batches: Sequence[Batch], choices: Sequence[Gates | None], budgets: Sequence[int] = ()
    ) -> None:
        """Compare what a step starts from; `budgets` are all that it draws. Raises SanityError on all ranks alike."""
        if moment.step % self.every_n_steps:
            return
        state, left = self._state(), self._left if self._left_after_step == moment.step - 1 else {}
        found = self._compare_state(state, {name for name in state if state[name] != left.get(name, state[name])})
        position = dict(seed=self.seed, step=moment.step, phase=moment.phase_index, data=moment.consumed_samples)
        position["budgets"] = text_fingerprint(tuple(budgets))
        found += self._compare(position, None, "all ranks")
        drawn: dict[str, Tensor] = {}
        for index, (batch, gates) in enumerate(zip(batches, choices, strict=True)):
            drawn[f"sample ids of micro-batch {index}"] = fingerprint(batch.sample_ids)
            if gates is not None:
                budget = text_fingerprint((gates.budget, gates.subnet))
                drawn[f"budget of micro-batch {index}"] = torch.tensor(budget)
                for axis, leaf in gates.weights.items():
                    drawn[f"gates {axis.value} of micro-batch {index}"] = fingerprint(leaf)
        groups = self.world.groups
        for group, over in ((groups.tp, "tensor"), (groups.pp, "pipeline"), (groups.cp, "context")):
            found += self._compare(self._read(drawn), group, f"{over}-parallel ranks")
        self._raise_on_all_ranks(found, f"before step {moment.step + 1}")

    def after_step(self, moment: Moment) -> None:
        """Compare what the step left; raises SanityError on all ranks alike."""
        if moment.step % self.every_n_steps:
            return
        state = self._state()
        self._raise_on_all_ranks(self._compare_state(state, set()), f"after step {moment.step + 1}")
        self._left, self._left_after_step = state, moment.step

    def _state(self) -> dict[str, int]:
        """Return the fingerprints of this rank's weights, optimizer state and router, by name."""
        state = {f"weight {name}": fingerprint(weight) for name, weight in named_global_parameters(self.trained.model)}
        state |= self._optimizer_state()
        router, optimizer = self.trained.router, self.trained.router_optimizer
        for name, parameter in () if router is None else router.named_parameters():
            state[f"router weight {name}"] = fingerprint(parameter)
            adam = {} if optimizer is None else optimizer.state.get(parameter, {})
            state |= {f"router Adam {key} {name}": fingerprint(value) for key, value in adam.items()}
        return self._read(state)

    def _optimizer_state(self) -> dict[str, Tensor]:
        """Return the fingerprints of what the optimizer keeps of each weight. A shard of one has a name of its own."""
        names = {}
        for name, weight in named_global_parameters(self.trained.model):
            main = getattr(weight, "main_param", None)
            names[id(weight if main is None else main)] = (name, main is not None)
        state = {}
        optimizer = self.trained.optimizer
        for number, part in enumerate(() if optimizer is None else optimizer.chained_optimizers):
            kept = [] if part.is_stub_optimizer else [p for group in part.param_groups for p in group["params"]]
            for index, parameter in enumerate(kept):
                name, is_main = names.get(id(parameter), (f"{index} of optimizer {number}", True))
                sharded = "shard of " if part.config.use_distributed_optimizer else ""
                if is_main:
                    state[f"{sharded}main weight {name}"] = fingerprint(parameter)
                adam = part.optimizer.state.get(parameter, {})
                tensors = {key: value for key, value in adam.items() if isinstance(value, Tensor)}
                state |= {f"{sharded}Adam {key} {name}": fingerprint(value) for key, value in tensors.items()}
        return state

    def _read(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        """Bring fingerprints from the device at once."""
        return dict(zip(values, torch.stack([v.to(self.world.device) for v in values.values()]).tolist(), strict=True))

    def _compare_state(self, state: Mapping[str, int], moved: set[str]) -> list[str]:
        """Return one message per copy that differs, and per value that moved without a step."""
        groups, rank = self.world.groups, torch.distributed.get_rank()
        found = [f"{name} changed on rank {rank} since the last step" for name in state if name in moved]
        copies = {name: value for name, value in state.items() if name.startswith(COPIED)}
        replicated = {name: value for name, value in copies.items() if sharded_dim(name.rpartition(" ")[2]) is None}
        routers = {name: value for name, value in state.items() if name.startswith("router ")}
        found += self._compare(copies, groups.dp_cp, "data-parallel ranks", moved)
        found += self._compare(replicated, groups.tp, "tensor-parallel ranks", moved)
        if self.trained.model.share_embeddings_and_output_weights and EMBEDDING in copies:
            tied = {EMBEDDING: copies[EMBEDDING]}
            found += self._compare(tied, groups.embd, "first and last pipeline stage", moved)
        return found + self._compare(routers, None, "all ranks", moved)

    def _compare(
        self, values: Mapping[str, int], group: ProcessGroup | None, over: str, moved: Collection[str] = ()
    ) -> list[str]:
        """Return a message for each value that differs over `group` (None: all ranks), the same on all its ranks."""
        ranks = torch.distributed.get_process_group_ranks(group)
        if len(ranks) == 1 or not values:
            return []
        own = torch.tensor([(value, name in moved) for name, value in values.items()], dtype=torch.int64)
        own = own.to(self.world.device)
        gathered = [torch.empty_like(own) for _ in ranks]
        torch.distributed.all_gather(gathered, own, group=group)
        table = torch.stack(gathered, dim=1).tolist()  # of each value, what every rank has
        found = []
        for name, row in zip(values, table, strict=True):
            seen = {rank: value for rank, (value, _) in zip(ranks, row, strict=True)}
            if len(set(seen.values())) > 1:
                suspects = [rank for rank, (_, has_moved) in zip(ranks, row, strict=True) if has_moved]
                found.append(f"{name} differs over {over} {', '.join(map(str, ranks))}: {_blame(seen, suspects)}")
        return found

    def _raise_on_all_ranks(self, found: Sequence[str], when: str) -> None:
        everyone: list[tuple[str, Sequence[str]]] = [("", ())] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (platform.node(), found))
        messages = list(dict.fromkeys(message for _, theirs in everyone for message in theirs))
        if not messages:
            return
        named = [rank for rank in range(len(everyone)) if any(f"rank {rank} " in message for message in messages)]
        hosts = [f"rank {rank} runs on {everyone[rank][0]}" for rank in named]
        passed = "none yet" if self._left_after_step is None else f"after step {self._left_after_step + 1}"
        lines = [f"debug.sanity: {when} copies differ", *first_few(messages, MAX_SHOWN), *hosts]
        raise SanityError(
            "\n  ".join(lines) + f"\nThe last check that passed: {passed}. Leave the machine of a rank named here out, "
            "and go on from a checkpoint up to that step"
        )


def _blame(seen: Mapping[int, int], moved: Sequence[int]) -> str:
    """Say which ranks are wrong: those that changed by themselves, else those the majority contradicts."""
    if 0 < len(moved) < len(seen):
        return " and ".join(f"rank {rank} changed" for rank in moved) + " since the last step"
    (most, count), *others = Counter(seen.values()).most_common()
    if others and others[0][1] == count:
        return "as many ranks for one value as for another, none of them changed between steps"
    return " and ".join(f"rank {rank} contradicts" for rank, value in seen.items() if value != most) + " the others"


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Return an int64 scalar on the tensor's device: the sum of its raw bits, each times an odd number of its place.

    Integer arithmetic modulo 2^64, so exact and without an order: one changed value always changes the result.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        places = torch.arange(start, start + part.numel(), device=tensor.device)
        total += (part * (2 * (_FACTOR * places) + 1)).sum()
    return total


def text_fingerprint(value: object) -> int:
    """Return the same kind of number for anything whose repr says all about it."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)
