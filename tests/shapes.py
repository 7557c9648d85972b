"""Model shapes that several tests use, and a random subnet."""

import torch

from elastic.space.axes import Axis
from elastic.space.shape import ModelShape
from elastic.space.space import Space

NANO_12B = ModelShape.uniform(
    "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", vocab=131072, hidden=5120, ffn=20480,
    mamba_heads=128, head_channels=80, mamba_groups=8, mamba_state=128, conv_kernel=4, attention_heads=40, kv_heads=8,
    attention_channels=128,
)  # fmt: skip
# No two axes that could be mistaken for each other, and sizes that are no powers of two.
UNEVEN = ModelShape.uniform(
    "M-*M-", vocab=48, hidden=24, ffn=32, mamba_heads=8, head_channels=6, mamba_groups=2, mamba_state=8, conv_kernel=4,
    attention_heads=6, kv_heads=2, attention_channels=8,
)  # fmt: skip


def random_choice(space: Space, generator: torch.Generator) -> dict[Axis, tuple[int, ...]]:
    """Draw choice indices uniformly on every axis and slot."""
    counts = {axis: (len(choices.choices), (space.num_slots(axis),)) for axis, choices in space.axes.items()}
    return {axis: tuple(torch.randint(*count, generator=generator).tolist()) for axis, count in counts.items()}
