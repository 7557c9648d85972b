"""Mask and slice execution against the plain HybridModel with the same kernels and against built submodels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from elastic.model.backends import Kernels
from elastic.model.model import build_model, transformer_config
from elastic.model.specs import plain_stack_spec
from elastic.space.axes import Axis
from elastic.space.cost import shape_cost, subnet_cost
from elastic.space.gates import Gates
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import Layout
from recipes.benchmarks._timing import alternate, median_ratio


@dataclass(frozen=True)
class Size:
    """One parent of the benchmark; S and B are the sequence length and micro-batch of a step."""

    name: str
    shape: ModelShape
    sequence: int = 512
    batch: int = 2


def sizes() -> tuple[Size, ...]:
    """Return parents of about 5M and 25M parameters."""
    common: dict[str, Any] = dict(mamba_groups=4, mamba_state=32, conv_kernel=4, kv_heads=2, vocab=2048)
    small = ModelShape.uniform(
        "M-M*-M-M*-M-", hidden=224, ffn=896, mamba_heads=16, head_channels=32, attention_heads=8,
        attention_channels=32, **common,
    )  # fmt: skip
    large = ModelShape.uniform(
        "M-M-M*-M-M-M*-M-M-", hidden=448, ffn=1792, mamba_heads=32, head_channels=32, attention_heads=8,
        attention_channels=64, **common,
    )  # fmt: skip
    return Size("5M", small), Size("25M", large, batch=1)


def widths(full: int, num_choices: int, multiple: int) -> tuple[int, ...]:
    """Return evenly spaced choices from `full` down to half of it, multiples of `multiple`."""
    step = full / 2 / max(1, num_choices - 1)
    return tuple(
        sorted({round((full - index * step) / multiple) * multiple for index in range(num_choices)}, reverse=True)
    )


def elastic_space(shape: ModelShape, num_choices: int) -> Space:
    """Return a space with up to `num_choices` on every axis that the shape's layers have."""
    axes = {
        Axis.HIDDEN: AxisChoices(widths(shape.hidden, num_choices, 16)),
        Axis.FFN: AxisChoices(widths(shape.ffn[0], num_choices, 8), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices(widths(shape.mamba_heads[0], num_choices, shape.mamba_groups)),
        Axis.MAMBA_CHANNEL: AxisChoices(widths(shape.head_channels, num_choices, 4)),
        Axis.DEPTH: AxisChoices(widths(len(shape.pattern), num_choices, 1)),
    }
    if shape.attention_heads:
        axes[Axis.ATTENTION_HEAD] = AxisChoices(widths(shape.attention_heads[0], num_choices, shape.kv_heads))
    return Space(shape, axes)


def soft_gates(space: Space) -> Gates:
    """Return soft gates over every elastic axis, leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for axis in space.elastic_axes():
        logits = torch.randn(space.num_slots(axis), len(space.axes[axis].choices), generator=generator)
        weights[axis] = logits.softmax(dim=-1).requires_grad_()
    return Gates.mask(weights)


def closest_subnet(space: Space, ratio: float) -> Subnet:
    """Return the subnet with every width scaled alike whose parameters come closest to `ratio` of the parent's."""
    full = shape_cost(space.parent).params
    scaled = (_scaled(space.parent, percent / 100) for percent in range(30, 101))
    return min(scaled, key=lambda subnet: abs(float(subnet_cost(space.parent, subnet).params) / float(full) - ratio))


def _scaled(shape: ModelShape, share: float) -> Subnet:
    def width(full: int, multiple: int) -> int:
        return max(multiple, round(full * share / multiple) * multiple)

    return Subnet(
        hidden=width(shape.hidden, 8),
        ffn=tuple(width(full, 8) for full in shape.ffn),
        mamba_heads=tuple(width(full, shape.mamba_groups) for full in shape.mamba_heads),
        head_channels=shape.head_channels,
        attention_heads=tuple(width(full, shape.kv_heads) for full in shape.attention_heads),
        kept_layers=tuple(range(len(shape.pattern))),
    )


def plain_model(shape: ModelShape, layout: Layout) -> nn.Module:
    """Build the stock HybridModel of `shape` with the same state-space and attention kernels."""
    from elastic.model.cpu_backend import use_cpu_backend
    from elastic.model.initialize import initialize_parameters

    use_cpu_backend()
    model = HybridModel(
        transformer_config(shape, layout),
        plain_stack_spec(Kernels.choose(), shape.conv_kernel),
        vocab_size=shape.vocab,
        max_sequence_length=1,
        hybrid_layer_pattern=str(shape.pattern),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    initialize_parameters(model, shape, 0, 0.02, 0, 1)
    return model


def _step(forward: Callable[[], Tensor], model: nn.Module) -> Callable[[], None]:
    """Return forward, a loss on the logits and backward; gradients are dropped, not accumulated."""

    def run() -> None:
        forward().float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def run(rounds: int, precisions: Sequence[torch.dtype]) -> list[dict[str, Any]]:
    """Measure both sizes in each of `precisions` (fp32, bf16); one row per comparison."""
    rows = []
    for size in sizes():
        for dtype in precisions:
            rows += _measure(size, dtype, rounds)
    return rows


def _measure(size: Size, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    layout = Layout(dtype=dtype)
    tokens = torch.randint(size.shape.vocab, (size.batch, size.sequence), generator=torch.Generator().manual_seed(1))
    plain = plain_model(size.shape, layout)
    cases = {"plain": _step(lambda: plain(tokens, None, None), plain)}
    for num_choices in (3, 5):
        space = elastic_space(size.shape, num_choices)
        model, gates = build_model(space, layout), soft_gates(space)
        cases["ungated"] = _elastic_step(model, tokens, None)
        cases[f"mask {num_choices}"] = _elastic_step(model, tokens, gates)
    for ratio in (0.7, 0.45):
        subnet = closest_subnet(space, ratio)
        submodel = build_model(Space(subnet.shape(size.shape), {}, lanes=1), layout)
        cases[f"slice {ratio}"] = _elastic_step(model, tokens, Gates.slice(subnet))
        cases[f"submodel {ratio}"] = _elastic_step(submodel, tokens, None)
    seconds = alternate(cases, rounds)
    pairs: list[tuple[str, str, float | None]] = [("mask 3", "plain", 1.10), ("mask 5", "plain", 1.10)]
    pairs += [("mask 3", "ungated", None), ("mask 5", "ungated", None)]
    pairs += [(f"slice {r}", f"submodel {r}", 1.10) for r in (0.7, 0.45)] + [
        (f"slice {r}", "plain", None) for r in (0.7, 0.45)
    ]
    precision = "fp32" if dtype is torch.float32 else "bf16"
    return [
        {
            "what": f"{case} / {against}",
            "model": size.name,
            "precision": precision,
            "ratio": median_ratio(seconds, case, against),
            "goal": goal,
        }
        for case, against, goal in pairs
    ]


def _elastic_step(model: Any, tokens: Tensor, gates: Gates | None) -> Callable[[], None]:
    return _step(lambda: model(tokens, gates) @ model.head_weight(gates).t(), model)
