"""Model shapes that several tests use, a random subnet, and random times of layers."""

import itertools
import math

import torch

from elastic.space.axes import Axis
from elastic.space.latency import SIZES, LatencyTable, Machine, Measured, grid_of, part_axes, parts_of
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


def random_table(space: Space, generator: torch.Generator, batch: int = 1, length_tokens: int = 8192) -> LatencyTable:
    """Draw times that grow with every width, but not by a formula, and differ between decode and prefill."""
    widths = grid_of(space.parent, {axis: choices.choices for axis, choices in space.axes.items()})

    def times(axes: tuple[Axis, ...]) -> tuple[float, ...]:
        points = itertools.product(*(range(1, len(widths[axis]) + 1) for axis in axes))
        draws = [(point, 0.2 * float(torch.rand((), generator=generator))) for point in points]
        return tuple(0.05 + math.prod(index**0.8 for index in point) + jitter for point, jitter in draws)

    rows = []
    for timed in ("decode", "prefill"):
        layer_ms = {part: times(part_axes(part)) for part in parts_of(space.parent)}
        rows.append(Measured(timed, batch, length_tokens, layer_ms, {part: (0.02,) for part in layer_ms}))
    sizes = {name: getattr(space.parent, name) for name in SIZES}
    return LatencyTable(Machine("there", "a device", 1, "2.0"), "fp32", sizes, widths, tuple(rows))
