"""Deterministic loss of subnets on the held-out split: argmax choices, no noise, fixed sequences."""

from collections.abc import Mapping
from dataclasses import dataclass

from elastic.data.stream import HeldOut, validation_batches
from elastic.space.gates import Gates
from elastic.train.metrics import LossMeter, MeanLoss
from elastic.train.pipeline import PipelineRunner
from elastic.world.groups import World


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of one subnet over all held-out sequences, and over those of each source."""

    mean: MeanLoss
    by_source: dict[str, MeanLoss]


def evaluate_subnets(
    runner: PipelineRunner,
    gates: Mapping[str, Gates | None],
    held_out: HeldOut,
    *,
    num_sequences: int,
    micro_batch_size: int,
    world: World,
) -> dict[str, HeldOutLoss]:
    """Return the mean cross-entropy of each named choice (None: the whole parent) over the same held-out sequences.

    Every rank must call it; all ranks return the same numbers, whatever the layout.
    """
    batches = list(
        validation_batches(
            held_out,
            num_sequences,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=world.data_rank,
            data_parallel_size=world.data_size,
        )
    )
    sources = list(dict(batches))
    num_rows = 1 + len(sources)  # of each choice: all sequences, then those of each source
    meter = LossMeter(len(gates) * num_rows, world)
    for first, choice in zip(range(0, len(gates) * num_rows, num_rows), gates.values(), strict=True):
        for source, batch in batches:
            loss = runner.evaluate([runner.share(batch, choice)])
            meter.add(loss, row=first)
            meter.add(loss, row=first + 1 + sources.index(source))
    means = iter(meter.read())
    return {name: HeldOutLoss(next(means), {source: next(means) for source in sources}) for name in gates}
