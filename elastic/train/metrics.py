"""Sums of losses per budget, kept on the device and reduced only where they are read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elastic.train.pipeline import MicroBatchLoss
from elastic.world.groups import World

_COLUMNS = ("kl", "cross_entropy", "kl_tokens", "num_tokens")  # no teacher, no kl: its tokens are counted apart


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
    """Accumulates MicroBatchLoss sums, one row per budget; row 0 alone for a run without budgets."""

    def __init__(self, num_rows: int, world: World) -> None:
        self.world = world
        # fp64: sums over many tokens, and equal whatever order replicas are added in.
        self.sums = torch.zeros(num_rows, len(_COLUMNS), dtype=torch.float64, device=world.device)

    def add(self, losses: Sequence[MicroBatchLoss], row: int | None = None) -> None:
        """Add the losses of some micro-batches without waiting for the device; `row` overrides their budget."""
        for loss in losses:
            index = row if row is not None else loss.budget or 0
            kl_tokens = None if loss.kl is None else loss.num_tokens
            for column, value in enumerate((loss.kl, loss.cross_entropy, kl_tokens, loss.num_tokens)):
                if value is not None:
                    self.sums[index, column] += value

    def read(self) -> list[MeanLoss]:
        """Reduce over all ranks (every rank must call), return the means and begin anew. Waits for the device."""
        # One tensor-parallel rank speaks for each token; earlier pipeline stages hold none.
        total = self.sums * float(self.world.groups.tp.rank() == 0)
        torch.distributed.all_reduce(total)
        self.sums.zero_()
        means = []
        for kl, cross_entropy, kl_tokens, num_tokens in total.tolist():
            means.append(
                MeanLoss(
                    kl=kl / kl_tokens if kl_tokens else None,
                    cross_entropy=cross_entropy / num_tokens if num_tokens else None,
                    num_tokens=int(num_tokens),
                )
            )
        return means
