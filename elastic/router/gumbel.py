"""Gumbel noise and the softmax that turns logits into choice probabilities. K choices, slots as in Space."""

import torch
from torch import Tensor

from elastic.router.streams import stream
from elastic.space.axes import Axis


def gumbel_noise(seed: int, step: int, micro_batch: int, axis: Axis, shape: tuple[int, int]) -> Tensor:
    """Draw Gumbel(0, 1) noise [slots, K], fp32: its own stream per axis and global micro-batch."""
    exponential = torch.empty(shape, dtype=torch.float64)
    exponential.exponential_(generator=stream(seed, f"gumbel/{axis}", step, micro_batch))
    return exponential.clamp(min=torch.finfo(torch.float64).tiny).log().neg().float()


def choice_probabilities(logits: Tensor, noise: Tensor | None, scale: float, temperature: float) -> Tensor:
    """Return softmax((scale * logits + noise) / temperature) over the last dimension, fp32."""
    scaled = logits.float() * scale
    return torch.softmax((scaled if noise is None else scaled + noise) / temperature, dim=-1)
