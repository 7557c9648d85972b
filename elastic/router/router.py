"""The router, one small network per elastic axis: from a budget to logits, and with noise to choice probabilities.

K choices, slots as in Space.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elastic.router.sampler import stream
from elastic.space.axes import Axis
from elastic.space.space import Space


class Router(nn.Module):
    """one-hot budget -> Linear -> LeakyReLU -> Linear per axis (docs/method.md 1.3), fp32, replicated on every rank."""

    def __init__(self, space: Space, num_budgets: int, hidden_width: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.num_budgets, self.hidden_width = num_budgets, hidden_width
        self.sizes = {axis: (space.num_slots(axis), len(space.axes[axis].choices)) for axis in space.elastic_axes()}
        self.networks = nn.ModuleDict()
        for axis, (slots, choices) in self.sizes.items():
            first, last = nn.Linear(num_budgets, hidden_width), nn.Linear(hidden_width, slots * choices)
            generator = stream(seed, f"router/{axis}")
            for layer in (first, last):
                bound = 1.0 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
            self.networks[axis.value] = nn.Sequential(first, nn.LeakyReLU(), last)

    def forward(self) -> dict[Axis, Tensor]:
        """Return logits [budgets, slots, K] for every elastic axis and all budgets at once.

        Divided by the root of the hidden width (ours): at the published learning rate of 1e-2 every step would else
        move a logit by about 1, and the first steps would settle the choices before temperature and scale can.
        """
        one_hot = torch.eye(self.num_budgets, device=next(self.parameters()).device)
        return {
            axis: self.networks[axis.value](one_hot).view(self.num_budgets, *size) / math.sqrt(self.hidden_width)
            for axis, size in self.sizes.items()
        }


def gumbel_noise(seed: int, step: int, draw: int, axis: Axis, shape: Sequence[int]) -> Tensor:
    """Draw Gumbel(0, 1) noise of `shape`, fp32: its own stream per axis and draw."""
    exponential = torch.empty(shape, dtype=torch.float64)
    exponential.exponential_(generator=stream(seed, f"gumbel/{axis}", step, draw))
    return exponential.clamp(min=torch.finfo(torch.float64).tiny).log().neg().float()


def choice_probabilities(logits: Tensor, noise: Tensor, scale: float, temperature: float) -> Tensor:
    """Return softmax((scale * logits + noise) / temperature) over the last dimension, fp32."""
    return torch.softmax((scale * logits.float() + noise) / temperature, dim=-1)
