"""Gumbel noise and the softmax that turns logits into choice probabilities. K choices, slots as in Space."""

from collections.abc import Mapping

import torch
from torch import Tensor

from elastic.router.sampler import stream
from elastic.space.axes import Axis


def gumbel_noise(seed: int, step: int, draw: int, axis: Axis, shape: tuple[int, int]) -> Tensor:
    """Draw Gumbel(0, 1) noise [slots, K], fp32: its own stream per axis and draw."""
    exponential = torch.empty(shape, dtype=torch.float64)
    exponential.exponential_(generator=stream(seed, f"gumbel/{axis}", step, draw))
    return exponential.clamp(min=torch.finfo(torch.float64).tiny).log().neg().float()


def choice_probabilities(logits: Tensor, noise: Tensor | None, scale: float, temperature: float) -> Tensor:
    """Return softmax((scale * logits + noise) / temperature) over the last dimension, fp32."""
    scaled = logits.float() * scale
    return torch.softmax((scaled if noise is None else scaled + noise) / temperature, dim=-1)


def choice_entropy(logits: Mapping[Axis, Tensor], scale: float, shares: Mapping[Axis, Tensor]) -> Tensor:
    """Return the entropy of the noise-free choices in nats, fp32: mean over slots, sum over budgets and axes.

    Each axis counts by its share of the cost ([budgets], `cost_shares`). Rewarded early in a phase and no more at its
    end (ours): a router that is certain of most slots while the temperature still falls cannot correct its cost by the
    width of one slot later. The loss one slot can move shrinks with its share, so an unweighted sum over the slots of
    a large parent would outweigh it and hold them all undecided until the end.
    """
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for axis, values in logits.items():
        log_probabilities = torch.log_softmax(values.float() * scale, dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)  # [budgets, slots]
        total = total + (shares[axis].to(entropy.device) * entropy.mean(dim=-1)).sum()
    return total
