"""Expected widths under independent choice probabilities: what the cost table takes instead of a subnet's integers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from elastic.space.axes import Axis, Space
from elastic.space.cost import Widths


def expected_widths(space: Space, probabilities: Mapping[Axis, Tensor]) -> Widths:
    """Return expected widths [...] under independent probabilities [..., slots, K]; an absent axis stays full."""

    def expected(axis: Axis) -> Tensor:  # [..., slots]
        own = probabilities[axis].double()
        return own @ torch.tensor(space.axes[axis].choices, dtype=torch.float64, device=own.device)

    def shared(axis: Axis, full: int) -> Tensor | int:
        return expected(axis)[..., 0] if axis in probabilities else full

    def per_layer(axis: Axis, full: tuple[int, ...]) -> tuple[Tensor | int, ...]:
        if axis not in probabilities:
            return full
        slots = expected(axis)
        return tuple(slots[..., space.slot(axis, ordinal)] for ordinal in range(len(full)))

    parent = space.parent
    keep: list[Tensor | int] = [1] * len(parent.pattern)
    if Axis.DEPTH in probabilities:
        table = torch.zeros(len(space.axes[Axis.DEPTH].choices), len(parent.pattern), dtype=torch.float64)
        for row, depth in enumerate(space.axes[Axis.DEPTH].choices):
            table[row, list(space.kept_layers(depth))] = 1.0
        own = probabilities[Axis.DEPTH][..., 0, :].double()
        keep = list((own @ table.to(own.device)).unbind(-1))
    return Widths(
        hidden=shared(Axis.HIDDEN, parent.hidden),
        ffn=per_layer(Axis.FFN, parent.ffn),
        mamba_heads=per_layer(Axis.MAMBA_HEAD, parent.mamba_heads),
        head_channels=shared(Axis.MAMBA_CHANNEL, parent.head_channels),
        attention_heads=per_layer(Axis.ATTENTION_HEAD, parent.attention_heads),
        keep=keep,
    )
