"""Mean losses: of training steps per budget, and of subnets on the held-out split (argmax, no noise, fixed order)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from elastic.data.held_out import HeldOut, validation_batches
from elastic.space.gates import Gates
from elastic.train.pipeline import MicroBatchLoss, PipelineRunner
from elastic.world.groups import World


@dataclass(frozen=True)
class MeanLoss:
    """Means over tokens; None where nothing of the kind was seen."""

    kl: float | None
    cross_entropy: float | None
    num_tokens: int

    @property
    def perplexity(self) -> float | None:
        """Return exp(cross-entropy)."""
        return None if self.cross_entropy is None else math.exp(min(self.cross_entropy, 700.0))


class LossMeter:
    """Accumulates MicroBatchLoss sums, one row per budget; row 0 alone for a run without budgets.

    Behind those, of a blend: a row per source, those of the first budget, of the second, and so on.
    """

    def __init__(self, num_rows: int, device: torch.device, num_sources: int = 0) -> None:
        self.num_budgets, self.num_sources = num_rows, num_sources
        # Per row the sums of kl and cross-entropy and the tokens of each: no teacher, no kl. fp64: sums over many
        # tokens, and equal whatever order replicas are added in.
        self.sums = torch.zeros(num_rows * (1 + num_sources), 4, dtype=torch.float64, device=device)

    def add(self, losses: Sequence[MicroBatchLoss], row: int | None = None) -> None:
        """Add the losses of some micro-batches without waiting for the device; `row` overrides their budget."""
        for loss in losses:
            index = row if row is not None else loss.budget or 0
            kl_tokens = None if loss.kl is None else loss.num_tokens
            for column, value in enumerate((loss.kl, loss.cross_entropy, kl_tokens, loss.num_tokens)):
                if value is not None:
                    self.sums[index, column] += value
            first = self.num_budgets + index * self.num_sources
            for source, sums in zip(loss.sources, () if loss.rows is None else loss.rows.unbind(1), strict=True):
                self.sums[first + source] += sums

    def collect(self, world: World) -> None:
        """Leave all sums with rank 0, whatever the layout then is. Every rank must call."""
        # One tensor-parallel rank speaks for each token; earlier pipeline stages hold none.
        self.sums *= float(world.groups.tp.rank() == 0)
        torch.distributed.all_reduce(self.sums)
        if not world.is_main:
            self.sums.zero_()

    def read(self, world: World) -> list[MeanLoss]:
        """Reduce over all ranks (every rank must call), return the means and begin anew. Waits for the device."""
        self.collect(world)
        torch.distributed.broadcast(self.sums, src=0)
        total = self.sums.tolist()
        self.sums.zero_()
        return [
            MeanLoss(kl / kl_tokens if kl_tokens else None, entropy / tokens if tokens else None, int(tokens))
            for kl, entropy, kl_tokens, tokens in total
        ]


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of one subnet over all held-out sequences, over those of each source, and by parts of the sequence."""

    mean: MeanLoss
    by_source: dict[str, MeanLoss]
    by_position: tuple[MeanLoss, ...] = ()


def evaluate_subnets(
    runner: PipelineRunner,
    gates: Mapping[str, Gates | None],
    data: HeldOut,
    num_sequences: int,
    micro_batch_size: int,
    position_buckets: int = 1,
) -> dict[str, HeldOutLoss]:
    """Return the mean cross-entropy of each named choice (None: the whole parent) over the same held-out sequences.

    With several `position_buckets` also that of so many equal parts of the sequences, from the front. Every rank must
    call it; all ranks return the same numbers, whatever the layout.
    """
    world = runner.world
    batches = list(validation_batches(data, num_sequences, world.data_rank, world.data_size, micro_batch_size))
    sources = list(dict(batches))
    of_parts = position_buckets if position_buckets > 1 else 0
    num_rows = 1 + len(sources) + of_parts  # of each choice: all sequences, those of each source, parts of all
    meter = LossMeter(len(gates) * num_rows, world.device)
    for number, choice in enumerate(gates.values()):
        for source, batch in batches:
            loss = runner.evaluate([runner.share(batch, choice)], position_buckets)
            meter.add(loss, row=number * num_rows)
            meter.add(loss, row=number * num_rows + 1 + sources.index(source))
            for part, of_part in enumerate(loss if of_parts else ()):
                meter.add([of_part], row=number * num_rows + 1 + len(sources) + part)
    means = iter(meter.read(world))

    def next_one() -> HeldOutLoss:
        whole, by_source = next(means), {source: next(means) for source in sources}
        return HeldOutLoss(whole, by_source, tuple(next(means) for _ in range(of_parts)))

    return {name: next_one() for name in gates}
