"""The budget loss: |expected cost / target - 1|, from the one cost table."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from elastic.space.axes import Axis, Space
from elastic.space.budget import Budget
from elastic.space.cost import Deployment, Widths, cost


def expected_widths(space: Space, probabilities: Mapping[Axis, Tensor]) -> Widths:
    """Return expected widths under independent choice probabilities [slots, K]; an absent axis stays full."""

    def expected(axis: Axis) -> Tensor:
        choices = torch.tensor(space.axes[axis].choices, dtype=torch.float64)
        if axis not in probabilities:
            return choices[:1].expand(space.num_slots(axis))
        return probabilities[axis].double() @ choices.to(probabilities[axis].device)

    def per_layer(axis: Axis, full: tuple[int, ...]) -> tuple[Tensor | int, ...]:
        if axis not in probabilities:
            return full
        slots = expected(axis)
        return tuple(slots[space.slot(axis, ordinal)] for ordinal in range(len(full)))

    parent = space.parent
    keep: list[Tensor | int] = [1] * len(parent.pattern)
    if Axis.DEPTH in probabilities:
        kept = [set(space.kept_layers(depth)) for depth in space.axes[Axis.DEPTH].choices]
        weights = probabilities[Axis.DEPTH][0].double()
        for layer_index in range(len(parent.pattern)):
            here = torch.tensor([float(layer_index in layers) for layers in kept], dtype=torch.float64)
            keep[layer_index] = (weights * here.to(weights.device)).sum()
    return Widths(
        hidden=expected(Axis.HIDDEN)[0],
        ffn=per_layer(Axis.FFN, parent.ffn),
        mamba_heads=per_layer(Axis.MAMBA_HEAD, parent.mamba_heads),
        head_channels=expected(Axis.MAMBA_CHANNEL)[0],
        attention_heads=per_layer(Axis.ATTENTION_HEAD, parent.attention_heads),
        keep=keep,
    )


def budget_loss(
    space: Space, budgets: Sequence[Budget], probabilities: Mapping[Axis, Tensor], deployment: Deployment
) -> Tensor:
    """Return |cost / target - 1| [budgets], fp32, for probabilities [budgets, slots, K] of every elastic axis.

    Costs of 10^10 and their small differences do not fit fp32, so the table runs in fp64 and only the ratio is fp32.
    """
    losses = []
    for index, budget in enumerate(budgets):
        own = {axis: values[index] for axis, values in probabilities.items()}
        used = torch.as_tensor(cost(space.parent, expected_widths(space, own), deployment)[budget.metric])
        losses.append((used / budget.target - 1.0).abs().float())
    return torch.stack(losses)
