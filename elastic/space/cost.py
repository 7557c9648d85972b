"""The one cost table: parameters, bytes and FLOPs of a hybrid model, for integer and for expected widths.

Every formula but that of the stored size is a polynomial, linear in each axis, so the same code counts a Subnet exactly
(ints) and the expected cost under independent choice probabilities (tensors, differentiable). What a layer holds and
uses stands in layers.py; a skipped layer costs nothing.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from elastic.space.axes import AXES, INNER_AXIS, Axis, LayerKind
from elastic.space.latency import LatencyTable, Measured, Timed
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
    LATENCY_MS = "latency_ms"
    TOKENS_PER_S = "tokens_per_s"


MEASURED = (Metric.LATENCY_MS, Metric.TOKENS_PER_S)  # from the table of a machine
COUNTED = tuple(metric for metric in Metric if metric not in MEASURED)  # by formulas, whatever the machine


@dataclass(frozen=True)
class Deployment:
    """Conditions of a deployment: sequences held at once, their length in tokens, bytes per element.

    `latency` is what recipes/measure_latency.py measured under these conditions, and `timed` which pass latency means:
    decode, one more token of each of `batch` sequences that hold `length_tokens`, or prefill, reading all of them. A
    config names the file instead (config/latency.py).
    """

    batch: Sequences = 1
    length_tokens: Length = 8192
    weight_bytes: ElementBytes = 2.0
    kv_bytes: ElementBytes = 2.0
    ssm_bytes: ElementBytes = 4.0
    conv_bytes: ElementBytes = 2.0
    timed: Timed = "decode"
    latency: LatencyTable | None = None

    @property
    def measured(self) -> Measured | None:
        """Return what was measured under these conditions, if anything was."""
        return None if self.latency is None else self.latency.at(self.timed, self.batch, self.length_tokens)

    @property
    def tokens_per_pass(self) -> int:
        """Return the tokens that the timed pass reads or writes."""
        return self.batch * (self.length_tokens if self.timed == "prefill" else 1)


@dataclass(frozen=True)
class Widths:
    """Widths the table is evaluated at: ints, or expected values.

    `axes[axis]` is one number, or one for each parent layer of the axis's kind. `keep[l]` is 1 if layer l runs, 0 if it
    is skipped, or the probability that it runs. `chances[axis]` are the choices behind expected values and their
    probabilities [..., K], one or one for each layer as in `axes`: a measured time is not linear in the width.
    """

    axes: Mapping[Axis, Number | Sequence[Number]]
    keep: Sequence[Number]
    chances: Mapping[Axis, tuple[tuple[int, ...], Sequence[Tensor]]] = field(default_factory=dict)

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
        chances: dict[Axis, tuple[tuple[int, ...], Sequence[Tensor]]] = {}
        for axis, entry in AXES.items():
            axes[axis] = full = getattr(parent, entry.size)
            if axis in probabilities:
                weights = probabilities[axis].double()
                slots = (weights @ space.widths_table(axis, weights.device)).unbind(-1)  # each [...]
                axes[axis] = [slots[space.slot(axis, n)] for n in range(len(full))] if entry.own else slots[0]
                own = weights.unbind(-2)  # each [..., K]
                layers = [own[space.slot(axis, n)] for n in range(len(full))] if entry.own else own[:1]
                chances[axis] = space.axes[axis].choices, layers
        keep: Sequence[Number] = (1,) * len(parent.pattern)
        if Axis.DEPTH in probabilities:
            depths = probabilities[Axis.DEPTH][..., 0, :].double()
            keep = (depths @ space.widths_table(Axis.DEPTH, depths.device)).unbind(-1)
        return cls(axes, keep, chances)

    def of_layer(self, kind: LayerKind, ordinal: int) -> dict[Axis, Number]:
        """Return the width along every axis of one layer, by its kind and number among its kind."""
        own = {axis: self.axes[axis] for axis, entry in AXES.items() if entry.kind in (None, kind)}
        return {axis: width[ordinal] if isinstance(width, Sequence) else width for axis, width in own.items()}

    def behind(self, axis: Axis, ordinal: int) -> tuple[tuple[int, ...], Tensor | int]:
        """Return the widths a layer may have along an axis, and their probabilities [..., K]; or the one it has."""
        if axis in self.chances:
            choices, layers = self.chances[axis]
            return choices, layers[ordinal if AXES[axis].own else 0]
        width = self.axes[axis]
        width = width[ordinal] if isinstance(width, Sequence) else width
        assert isinstance(width, int), "an expected width says nothing of the choices behind it"
        return (width,), width


@dataclass(frozen=True)
class Cost:
    """What a subnet uses. Bytes follow the Deployment it was computed for.

    `params` counts the subnet's own; `stored_params` what a Hugging Face folder holds of it: layers of one kind are
    zero-padded to the widest that is kept, and the head is stored even if tied. Exact for a subnet; of expected widths
    the widest is the largest expectation, which is exact once each choice is certain. `latency_ms` is None where
    nothing was measured under the deployment's conditions, or not at these widths.
    """

    params: Number
    stored_params: Number
    weight_bytes: Number
    kv_bytes: Number
    ssm_bytes: Number
    conv_bytes: Number
    flops_per_token: Number
    latency_ms: Number | None = None
    tokens_per_s: Number | None = None

    @property
    def deploy_bytes(self) -> Number:
        """Weights and caches together."""
        return self.weight_bytes + self.kv_bytes + self.ssm_bytes + self.conv_bytes

    def __getitem__(self, metric: Metric) -> Number:
        value: Number | None = getattr(self, metric.value)
        assert value is not None, f"the rules of the config let no budget in {metric} through without a table"
        return value


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
    table, measured, latency = deployment.latency, deployment.measured, None
    if table is not None and measured is not None:
        latency = table.total_ms(measured, parent, widths.behind, widths.keep)
    return Cost(
        params=params,
        stored_params=stored,
        weight_bytes=params * deployment.weight_bytes,
        flops_per_token=flops,
        latency_ms=latency,
        tokens_per_s=None if latency is None else 1e3 * deployment.tokens_per_pass / latency,
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
    """A named limit on one metric: `target` in absolute units, or `ratio` of the parent's cost. Exactly one.

    `tolerance`: by what share of the target a choice may miss it, either way; ours.
    """

    name: MemberName
    metric: Metric = Metric.PARAMS
    target: Target | None = None
    ratio: Share | None = None
    tolerance: Share = 0.01

    @property
    def limit(self) -> float:
        """Return the target in its metric's unit; a ratio is made absolute first."""
        assert self.target is not None, "Budget.absolute comes first"
        return self.target

    def __str__(self) -> str:
        return f"{self.name} {self.metric} {self.limit:.10g} within {100 * self.tolerance:g}%"

    def asks_as(self, other: "Budget") -> bool:
        """Tell whether two absolute budgets ask for the same, a target rounded to whole parameters or not."""
        alike = (self.name, self.metric, self.tolerance) == (other.name, other.metric, other.tolerance)
        return alike and math.isclose(self.limit, other.limit, abs_tol=0.0 if self.metric in MEASURED else 0.5)

    def absolute(self, parent: ModelShape, deployment: Deployment) -> "Budget":
        """Return the budget with its ratio turned into a target, and tokens per second into the time they leave a pass.

        A limit on time is linear in choice probabilities and grows with the model, like every other cost.
        """
        if self.metric is Metric.TOKENS_PER_S:
            return replace(self, metric=Metric.LATENCY_MS, target=1e3 * deployment.tokens_per_pass / self.limit)
        if self.ratio is None:
            return self
        return replace(self, target=self.ratio * float(shape_cost(parent, deployment)[self.metric]), ratio=None)


def in_figures(metric: Metric, value: float) -> str:
    """Write a target or a cost: whole parameters, bytes or FLOPs; of times and speeds, four digits."""
    return f"{value:,.4g}" if metric in MEASURED else f"{value:,.0f}"
