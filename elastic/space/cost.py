"""The one cost table: parameters, bytes and FLOPs of a hybrid model, for integer and for expected widths.

Every formula is a polynomial, linear in each axis, so the same code counts a Subnet exactly (ints) and the expected
cost under independent choice probabilities (fp32 tensors, differentiable). Formulas: docs/method.md 2 and the shapes of
Megatron-Core's parameters; a skipped layer costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from elastic.space.pattern import LayerKind
from elastic.space.ranges import Count, Positive
from elastic.space.shape import ModelShape
from elastic.space.subnet import Subnet

Number = int | float | Tensor


class Metric(StrEnum):
    """What a budget may limit."""

    PARAMS = "params"
    WEIGHT_BYTES = "weight_bytes"
    DEPLOY_BYTES = "deploy_bytes"
    FLOPS_PER_TOKEN = "flops_per_token"


@dataclass(frozen=True)
class Deployment:
    """Conditions of a deployment: sequences held at once, their length in tokens, bytes per element."""

    batch: Count = 1
    length_tokens: Count = 8192
    weight_bytes: Positive = 2.0
    kv_bytes: Positive = 2.0
    ssm_bytes: Positive = 4.0
    conv_bytes: Positive = 2.0


@dataclass(frozen=True)
class Widths:
    """Widths the table is evaluated at: ints, or expected values. One entry per parent layer of the kind.

    `keep[l]` is 1 if layer l runs, 0 if it is skipped, or the probability that it runs.
    """

    hidden: Number
    ffn: Sequence[Number]
    mamba_heads: Sequence[Number]
    head_channels: Number
    attention_heads: Sequence[Number]
    keep: Sequence[Number]

    @classmethod
    def of(cls, subnet: Subnet, parent: ModelShape) -> "Widths":
        """Return the widths of a subnet."""
        kept = set(subnet.kept_layers)
        return cls(
            hidden=subnet.hidden,
            ffn=subnet.ffn,
            mamba_heads=subnet.mamba_heads,
            head_channels=subnet.head_channels,
            attention_heads=subnet.attention_heads,
            keep=tuple(int(index in kept) for index in range(len(parent.pattern))),
        )

    def inner(self, parent: ModelShape, layer_index: int) -> Number:
        """Return the inner width of one layer by its kind."""
        by_kind = {
            LayerKind.MAMBA: self.mamba_heads,
            LayerKind.MLP: self.ffn,
            LayerKind.ATTENTION: self.attention_heads,
        }
        return by_kind[parent.pattern.kinds[layer_index]][parent.pattern.ordinal(layer_index)]


@dataclass(frozen=True)
class Cost:
    """What a subnet uses. Bytes follow the Deployment it was computed for."""

    params: Number
    weight_bytes: Number
    kv_bytes: Number
    ssm_bytes: Number
    conv_bytes: Number
    flops_per_token: Number

    @property
    def deploy_bytes(self) -> Number:
        """Weights and caches together."""
        return self.weight_bytes + self.kv_bytes + self.ssm_bytes + self.conv_bytes

    def __getitem__(self, metric: Metric) -> Number:
        return getattr(self, metric.value)


def layer_params(shape: ModelShape, kind: LayerKind, inner: Number, hidden: Number, channels: Number) -> Number:
    """Count the parameters of one layer."""
    state = shape.mamba_groups * shape.mamba_state
    match kind:
        case LayerKind.MAMBA:
            d_inner = inner * channels
            projections = hidden * (2 * d_inner + 2 * state + inner) + d_inner * hidden
            conv = (shape.conv_kernel + 1) * (d_inner + 2 * state)
            return projections + conv + 3 * inner + d_inner + hidden
        case LayerKind.ATTENTION:
            a, kv = shape.attention_channels, shape.kv_heads
            return hidden * (inner + 2 * kv) * a + inner * a * hidden + hidden
        case LayerKind.MLP:
            return 2 * hidden * inner + hidden


def layer_flops_per_token(
    shape: ModelShape, kind: LayerKind, inner: Number, hidden: Number, channels: Number, length_tokens: int
) -> Number:
    """Count forward FLOPs of one layer for one token of a causal sequence of `length_tokens`.

    A multiply and an add are two. Attention scores average length / 2 keys; the state-space recurrence is counted
    as its state update and read (2 + 2 + 2 per state element), the convolution as its taps. Norms and
    activations are left out, as in Megatron-Core's own count.
    """
    state = shape.mamba_groups * shape.mamba_state
    match kind:
        case LayerKind.MAMBA:
            d_inner = inner * channels
            projections = hidden * (2 * d_inner + 2 * state + inner) + d_inner * hidden
            conv = shape.conv_kernel * (d_inner + 2 * state)
            return 2 * projections + 2 * conv + 6 * d_inner * shape.mamba_state
        case LayerKind.ATTENTION:
            a, kv = shape.attention_channels, shape.kv_heads
            projections = hidden * (inner + 2 * kv) * a + inner * a * hidden
            return 2 * projections + 2 * inner * a * length_tokens
        case LayerKind.MLP:
            return 4 * hidden * inner


def cost(parent: ModelShape, widths: Widths, deployment: Deployment) -> Cost:
    """Evaluate the table. `widths` follow the parent's layers; ints stay ints wherever the formula allows."""
    embeddings = parent.vocab * widths.hidden * (1 if parent.tied_embeddings else 2)
    params: Number = embeddings + widths.hidden
    flops: Number = 2 * parent.vocab * widths.hidden
    kv: Number = 0
    ssm: Number = 0
    conv: Number = 0
    state = parent.mamba_groups * parent.mamba_state
    for layer_index, kind in enumerate(parent.pattern.kinds):
        keep, inner = widths.keep[layer_index], widths.inner(parent, layer_index)
        params = params + keep * layer_params(parent, kind, inner, widths.hidden, widths.head_channels)
        flops = flops + keep * layer_flops_per_token(
            parent, kind, inner, widths.hidden, widths.head_channels, deployment.length_tokens
        )
        if kind is LayerKind.ATTENTION:
            kv = kv + keep * 2 * parent.kv_heads * parent.attention_channels * deployment.length_tokens
        elif kind is LayerKind.MAMBA:
            d_inner = inner * widths.head_channels
            ssm = ssm + keep * d_inner * parent.mamba_state
            conv = conv + keep * (d_inner + 2 * state) * parent.conv_kernel
    return Cost(
        params=params,
        weight_bytes=params * deployment.weight_bytes,
        kv_bytes=kv * deployment.batch * deployment.kv_bytes,
        ssm_bytes=ssm * deployment.batch * deployment.ssm_bytes,
        conv_bytes=conv * deployment.batch * deployment.conv_bytes,
        flops_per_token=flops,
    )


def subnet_cost(parent: ModelShape, subnet: Subnet, deployment: Deployment | None = None) -> Cost:
    """Count a subnet of `parent`."""
    return cost(parent, Widths.of(subnet, parent), deployment or Deployment())


def shape_cost(shape: ModelShape, deployment: Deployment | None = None) -> Cost:
    """Count a whole model."""
    return subnet_cost(shape, Subnet.full(shape), deployment)
