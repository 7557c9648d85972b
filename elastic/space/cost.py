"""The one cost table: parameters, bytes and FLOPs of a hybrid model, for integer and for expected widths.

Every formula but that of the stored size is a polynomial, linear in each axis, so the same code counts a Subnet exactly
(ints) and the expected cost under independent choice probabilities (tensors, differentiable). What a layer holds and
uses stands in layers.py; a skipped layer costs nothing.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from elastic.space.axes import AXES, INNER_AXIS, Axis, LayerKind
from elastic.space.layers import LAYERS, Number
from elastic.space.ranges import ElementBytes, Length, MemberName, Sequences, Share, Target
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import Space

# Kinds whose narrower layers a Hugging Face folder fills up with zeros; Mamba layers cannot be (hf/config.py).
PADDED = (LayerKind.MLP, LayerKind.ATTENTION)


class Metric(StrEnum):
    """What a budget may limit."""

    PARAMS = "params"
    STORED_PARAMS = "stored_params"
    WEIGHT_BYTES = "weight_bytes"
    DEPLOY_BYTES = "deploy_bytes"
    FLOPS_PER_TOKEN = "flops_per_token"


@dataclass(frozen=True)
class Deployment:
    """Conditions of a deployment: sequences held at once, their length in tokens, bytes per element."""

    batch: Sequences = 1
    length_tokens: Length = 8192
    weight_bytes: ElementBytes = 2.0
    kv_bytes: ElementBytes = 2.0
    ssm_bytes: ElementBytes = 4.0
    conv_bytes: ElementBytes = 2.0


@dataclass(frozen=True)
class Widths:
    """Widths the table is evaluated at: ints, or expected values.

    `axes[axis]` is one number, or one for each parent layer of the axis's kind. `keep[l]` is 1 if layer l runs, 0 if it
    is skipped, or the probability that it runs.
    """

    axes: Mapping[Axis, Number | Sequence[Number]]
    keep: Sequence[Number]

    @classmethod
    def of(cls, subnet: Subnet, parent: ModelShape) -> "Widths":
        """Return the widths of a subnet."""
        kept = set(subnet.kept_layers)
        axes = {axis: getattr(subnet, entry.size) for axis, entry in AXES.items()}
        return cls(axes, tuple(int(index in kept) for index in range(len(parent.pattern))))

    @classmethod
    def expected(cls, space: Space, probabilities: Mapping[Axis, Tensor]) -> "Widths":
        """Return expected widths [...] under independent probabilities [..., slots, K]; an absent axis stays full."""
        parent = space.parent
        axes: dict[Axis, Number | Sequence[Number]] = {}
        for axis, entry in AXES.items():
            axes[axis] = full = getattr(parent, entry.size)
            if axis in probabilities:
                weights = probabilities[axis].double()
                slots = (weights @ space.widths_table(axis, weights.device)).unbind(-1)  # each [...]
                axes[axis] = [slots[space.slot(axis, n)] for n in range(len(full))] if entry.own else slots[0]
        keep: Sequence[Number] = (1,) * len(parent.pattern)
        if Axis.DEPTH in probabilities:
            chances = probabilities[Axis.DEPTH][..., 0, :].double()
            keep = (chances @ space.widths_table(Axis.DEPTH, chances.device)).unbind(-1)
        return cls(axes, keep)

    def of_layer(self, kind: LayerKind, ordinal: int) -> dict[Axis, Number]:
        """Return the width along every axis of one layer, by its kind and number among its kind."""
        own = {axis: self.axes[axis] for axis, entry in AXES.items() if entry.kind in (None, kind)}
        return {axis: width[ordinal] if isinstance(width, Sequence) else width for axis, width in own.items()}


@dataclass(frozen=True)
class Cost:
    """What a subnet uses. Bytes follow the Deployment it was computed for.

    `params` counts the subnet's own; `stored_params` what a Hugging Face folder holds of it: layers of one kind are
    zero-padded to the widest that is kept, and the head is stored even if tied. Exact for a subnet; of expected widths
    the widest is the largest expectation, which is exact once each choice is certain.
    """

    params: Number
    stored_params: Number
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


def layer_cost(
    shape: ModelShape, kind: LayerKind, widths: Mapping[Axis, Number], length_tokens: int
) -> tuple[Number, Number]:
    """Count one layer's parameters, and its forward FLOPs for one token of a causal sequence of `length_tokens`.

    Two for every weight of a matrix or convolution (a multiply and an add), and what the kind mixes over tokens.
    """
    parameters = Counter(LAYERS[kind].parameters.values())
    sizes = {dim: dim.size(shape, widths) for dims in parameters for dim in dims}
    counts = {dims: times * math.prod(sizes[dim] for dim in dims) for dims, times in parameters.items()}
    matrices = sum(count for dims, count in counts.items() if len(dims) > 1)
    vectors = sum(count for dims, count in counts.items() if len(dims) == 1)
    return matrices + vectors, 2 * matrices + LAYERS[kind].mixing_flops(shape, widths, length_tokens)


def cost(parent: ModelShape, widths: Widths, deployment: Deployment) -> Cost:
    """Evaluate the table. `widths` follow the parent's layers; ints stay ints wherever the formula allows."""
    hidden = widths.of_layer(parent.pattern.kinds[0], 0)[Axis.HIDDEN]
    embeddings = parent.vocab * hidden * (1 if parent.tied_embeddings else 2)
    params: Number = embeddings + hidden
    stored: Number = params + (parent.vocab * hidden if parent.tied_embeddings else 0)
    widest = {kind: _widest(parent, widths, kind) for kind in PADDED if parent.pattern.layers_of(kind)}
    flops: Number = 2 * parent.vocab * hidden
    held: dict[str, Number] = dict.fromkeys(("kv_bytes", "ssm_bytes", "conv_bytes"), 0)
    kinds = parent.pattern.kinds
    layers = [widths.of_layer(kind, parent.pattern.ordinal(layer_index)) for layer_index, kind in enumerate(kinds)]
    for kind, own, keep in _alike(kinds, layers, widths.keep):
        layer_params, layer_flops = layer_cost(parent, kind, own, deployment.length_tokens)
        params, flops = params + keep * layer_params, flops + keep * layer_flops
        for name, elements in LAYERS[kind].cache(parent, own, deployment.length_tokens).items():
            held[name] = held[name] + keep * elements
    inner = {kind: {INNER_AXIS[kind]: width} for kind, width in widest.items()}
    as_stored = [{**own, **inner.get(kind, {})} for kind, own in zip(kinds, layers, strict=True)]
    for kind, own, keep in _alike(kinds, as_stored, widths.keep):
        stored = stored + keep * layer_cost(parent, kind, own, deployment.length_tokens)[0]
    return Cost(
        params=params,
        stored_params=stored,
        weight_bytes=params * deployment.weight_bytes,
        flops_per_token=flops,
        **{name: elements * deployment.batch * getattr(deployment, name) for name, elements in held.items()},
    )


def _alike(
    kinds: Sequence[LayerKind], layers: Sequence[Mapping[Axis, Number]], keep: Sequence[Number]
) -> Iterable[tuple[LayerKind, Mapping[Axis, Number], Number]]:
    """Join layers of a kind whose widths are the same objects: counted once, times how many of them run."""
    found: dict[tuple[LayerKind, tuple[int, ...]], tuple[LayerKind, Mapping[Axis, Number], Number]] = {}
    for kind, own, runs in zip(kinds, layers, keep, strict=True):
        key = kind, tuple(map(id, own.values()))
        found[key] = kind, own, runs + (found[key][2] if key in found else 0)
    return found.values()


def _widest(parent: ModelShape, widths: Widths, kind: LayerKind) -> Number:
    """Return the largest inner width of the layers of a kind that are kept, 0 if none is."""
    layers, axis = parent.pattern.layers_of(kind), INNER_AXIS[kind]
    pairs = [(widths.keep[layer], widths.of_layer(kind, ordinal)[axis]) for ordinal, layer in enumerate(layers)]
    kept = [keep * width for keep, width in {(id(k), id(w)): (k, w) for k, w in pairs}.values()]
    like = next((width for width in kept if isinstance(width, Tensor)), None)
    if like is None:
        return max(kept)
    tensors = torch.broadcast_tensors(*(torch.as_tensor(width, dtype=like.dtype, device=like.device) for width in kept))
    return torch.stack(tensors).amax(0)


def subnet_cost(parent: ModelShape, subnet: Subnet, deployment: Deployment | None = None) -> Cost:
    """Count a subnet of `parent`."""
    return cost(parent, Widths.of(subnet, parent), deployment or Deployment())


def shape_cost(shape: ModelShape, deployment: Deployment | None = None) -> Cost:
    """Count a whole model."""
    return subnet_cost(shape, Subnet.full(shape), deployment)


@dataclass(frozen=True)
class Budget:
    """A named limit on one metric: `target` in absolute units, or `ratio` of the parent's cost. Exactly one."""

    name: MemberName
    metric: Metric = Metric.PARAMS
    target: Target | None = None
    ratio: Share | None = None

    @property
    def limit(self) -> float:
        """Return the target (parameters, bytes or FLOPs per token); a ratio is made absolute first."""
        assert self.target is not None, "Budget.absolute comes first"
        return self.target

    def absolute(self, parent: ModelShape, deployment: Deployment) -> "Budget":
        """Return the budget with its ratio turned into a target."""
        if self.ratio is None:
            return self
        return replace(self, target=self.ratio * float(shape_cost(parent, deployment)[self.metric]), ratio=None)
