"""Deterministic loss of subnets on the held-out split: argmax choices, no noise, fixed sequences."""

from collections.abc import Mapping

from elastic.data.stream import PackedSequences, validation_batches
from elastic.space.gates import Gates
from elastic.train.metrics import LossMeter, MeanLoss
from elastic.train.pipeline import PipelineRunner
from elastic.world.groups import World


def evaluate_subnets(
    runner: PipelineRunner,
    gates: Mapping[str, Gates | None],
    dataset: PackedSequences,
    *,
    num_sequences: int,
    micro_batch: int,
    world: World,
) -> dict[str, MeanLoss]:
    """Return the mean cross-entropy of each named choice (None: the whole parent) over the same held-out sequences.

    Every rank must call it; all ranks return the same numbers, whatever the layout.
    """
    batches = list(
        validation_batches(
            dataset,
            num_sequences,
            micro_batch_size=micro_batch,
            data_parallel_rank=world.data_rank,
            data_parallel_size=world.data_size,
        )
    )
    meter = LossMeter(len(gates), world)
    for row, choice in enumerate(gates.values()):
        for batch in batches:
            meter.add(runner.evaluate([runner.micro_batch(batch, choice)]), row=row)
    return dict(zip(gates, meter.read(), strict=True))
