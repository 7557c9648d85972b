"""Which budget each micro-batch trains: stratified to the phase's weights, balanced over replicas."""

import hashlib
from collections.abc import Sequence

import torch


def stream(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of everything given.

    torch's CPU generator keeps 32 bits of a seed, so two streams coincide with a chance of one in 4 * 10^9.
    """
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_budgets(weights: Sequence[float], seed: int, step: int, num_draws: int) -> tuple[int, ...]:
    """Draw `num_draws` budgets for one step, a pure function of its arguments.

    Systematic sampling: budget b appears within one of num_draws * weight_b times, on average exactly; then shuffled.
    """
    generator = stream(seed, "budget", step)
    shares = torch.tensor(weights, dtype=torch.float64)
    edges = torch.cumsum(shares / shares.sum(), dim=0)
    edges[-1] = 1.0
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (offset + torch.arange(num_draws)) / num_draws
    budgets = torch.searchsorted(edges, points, right=True).clamp(max=len(weights) - 1)
    return tuple(budgets[torch.randperm(num_draws, generator=generator)].tolist())


def budget_of(budgets: Sequence[int], global_index: int, num_micro_batches: int) -> int:
    """Return the budget of global micro-batch `global_index` (over replicas) of `num_micro_batches` in the step.

    Draws cover equal runs of consecutive global micro-batches: what a sequence trains depends on its place in the
    global batch alone, not on replicas and micro-batches, and a replica count that divides a run's length gives every
    replica the same budget at the same time.
    """
    return budgets[global_index * len(budgets) // num_micro_batches]


def in_turn(_: object, num_micro_batches: int, replica: int, replicas: int) -> list[int]:
    """Return which of a step's micro-batches, counted over all replicas, this one runs: whatever the step, in turn."""
    return [index * replicas + replica for index in range(num_micro_batches)]
