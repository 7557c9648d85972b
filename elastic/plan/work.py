"""What one rank computes: a micro-batch on a layout, and the sizes of one layer's shard.

Shapes: T tokens of this context-parallel rank, t tokens of its stream (T / tp under sequence parallelism), U tokens a
Mamba scan sees (T x cp: the exchange trades tokens for heads), d hidden, f ffn, h heads, P head channels, g groups,
N state, i = h*P, a attention channels; lower case and `local` = this tensor-parallel rank's shard.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, cached_property
from itertools import accumulate
from typing import Self

import torch

from elastic.model.sharding import pipeline_pattern
from elastic.space.axes import Axis, LayerKind
from elastic.space.gates import Execution
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut, take
from elastic.space.shape import LayerPattern, ModelShape, Subnet
from elastic.world.groups import Layout

FP32_BYTES = 4
# Kernels of a forward and of a backward pass: mamba_chunk_scan_combined's (mamba-ssm 2.2, ssd_combined.py), and a fused
# attention's (backward: row sums, gradients, a conversion).
FUSED_LAUNCHES = {"scan": (5, 9), "attention": (1, 3)}
# Rows of the first projection and columns of the second: in_proj, out_proj; linear_qkv, linear_proj; fc1, fc2.
PROJECTIONS = {
    LayerKind.MAMBA: (DimKind.IN_PROJ, DimKind.INNER),
    LayerKind.ATTENTION: (DimKind.QKV, DimKind.CONTEXT),
    LayerKind.MLP: (DimKind.FFN, DimKind.FFN),
}


class KernelSet(StrEnum):
    """Which kernels run the scan, the convolution and the attention: they differ in what they keep for backward."""

    TORCH = "torch"
    FUSED = "fused"

    @property
    def chunk_tokens(self) -> int:
        """Return the tokens of a chunk of the scan, TorchStateSpace's or mamba-ssm's."""
        return 64 if self is KernelSet.TORCH else 256


class Summed:
    """Counts that add up field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            *(mine + yours for mine, yours in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def __mul__(self, factor: float) -> Self:
        return type(self)(*(mine * factor for mine in vars(self).values()))


@dataclass(frozen=True)
class MicroBatchWork:
    """One micro-batch on one layout: `batch` sequences of `length_tokens`, whole, before context parallelism.

    `subnet` is what a slice computes; in mask execution the parent is computed whatever the budget, and the
    `gated_axes`, those of the space with a choice, multiply it.
    """

    parent: ModelShape
    layout: Layout
    batch: int
    length_tokens: int
    execution: Execution
    subnet: Subnet
    kernels: KernelSet
    lanes: int = 8
    gated_axes: frozenset[Axis] = frozenset(Axis)

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.batch * self.length_tokens // self.layout.context

    @property
    def stream_tokens(self) -> int:
        """Return t."""
        return self.tokens // self.layout.tensor if self.layout.sequence else self.tokens

    @property
    def element_bytes(self) -> int:
        """Return the bytes of one activation."""
        return self.layout.dtype.itemsize

    @property
    def masked(self) -> bool:
        """Tell whether gate vectors multiply the activations."""
        return self.execution is Execution.MASK

    def gates(self, *axes: Axis) -> bool:
        """Tell whether a mask multiplies by the gate of one of these axes; hidden and depth multiply the stream."""
        return self.masked and not self.gated_axes.isdisjoint(axes)

    @property
    def hidden(self) -> int:
        """Return the width of the stream that is computed."""
        return self.parent.hidden if self.masked else self.subnet.hidden

    @property
    def local_vocab(self) -> int:
        """Return this rank's rows of the embedding and of the head."""
        return self.parent.vocab // self.layout.tensor

    @property
    def stream_bytes(self) -> int:
        """Return the bytes of this rank's stream [t, d]."""
        return self.stream_tokens * self.hidden * self.element_bytes

    @property
    def gathered_bytes(self) -> int:
        """Return the bytes of the stream of all tokens of this tensor-parallel group [T, d]."""
        return self.tokens * self.hidden * self.element_bytes

    @property
    def teacher(self) -> "MicroBatchWork":
        """Return the same micro-batch through the uncut parent, which the teacher runs."""
        return replace(self, execution=Execution.SLICE, subnet=Subnet.full(self.parent))

    def layers(self, stage: int) -> tuple["LayerWork", ...]:
        """Return the layers that run on one pipeline stage; a slice leaves out those its subnet skips."""
        kept = range(len(self.parent.pattern)) if self.masked else self.subnet.kept_layers
        return tuple(
            LayerWork(self, index) for index in stage_layers(self.parent, self.layout.pipeline)[stage] if index in kept
        )

    def distinct_layers(self, stage: int) -> list[tuple["LayerWork", int]]:
        """Return one layer of each (kind, width) on a stage and how many there are: the others cost the same."""
        alike: defaultdict[tuple[LayerKind, int], list[LayerWork]] = defaultdict(list)
        for layer in self.layers(stage):
            alike[layer.kind, layer.width].append(layer)
        return [(same[0], len(same)) for same in alike.values()]


@dataclass(frozen=True)
class LayerWork:
    """One layer on one rank."""

    run: MicroBatchWork
    layer_index: int

    @property
    def kind(self) -> LayerKind:
        """Return the layer's kind."""
        return self.run.parent.pattern.kinds[self.layer_index]

    @property
    def width(self) -> int:
        """Return the inner width that is computed, all ranks together: neurons or heads."""
        run = self.run
        return run.parent.width(self.layer_index) if run.masked else run.subnet.width(run.parent, self.layer_index)

    @property
    def local_width(self) -> int:
        """Return this tensor-parallel rank's neurons or heads."""
        return self.width // self.run.layout.tensor

    @cached_property
    def cut(self) -> Cut:
        """Return what this rank computes of the layer's weights."""
        run, lanes, ranks = self.run, self.run.lanes, self.run.layout.tensor
        kept = {} if run.masked else run.subnet.layer_widths(run.parent, self.layer_index)
        return Cut.of_layer(run.parent, self.layer_index, kept, lanes=lanes, tensor_parallel=ranks)

    @cached_property
    def rows(self) -> int:
        """Return the rows of this rank's first projection: in_proj, linear_qkv or linear_fc1."""
        return self.cut.grid(PROJECTIONS[self.kind][0]).kept_size

    @cached_property
    def inner(self) -> int:
        """Return the columns of this rank's second projection: i of a Mamba layer, h*a of an attention layer, f."""
        return self.cut.grid(PROJECTIONS[self.kind][1]).kept_size

    @property
    def local_groups(self) -> int:
        """Return g of a Mamba layer."""
        return self.run.parent.mamba_groups // self.run.layout.tensor

    @property
    def local_kv(self) -> int:
        """Return the channels of all keys (or all values) of this rank, kv*a."""
        return self.run.parent.kv_heads // self.run.layout.tensor * self.run.parent.attention_channels

    @property
    def scan(self) -> "ScanSizes":
        """Return the sizes of a Mamba layer between the exchanges, for which groups are repeated to go round."""
        context = self.run.layout.context
        return ScanSizes(
            tokens=self.run.tokens * context,
            heads=self.local_width // context,
            inner=self.inner // context,
            groups=max(1, self.local_groups // context),
            state=self.run.parent.mamba_state,
            batch=self.run.batch,
        )


@dataclass(frozen=True)
class ScanSizes:
    """Sizes of one scan: U tokens of `batch` sequences, and this rank's heads, their channels and groups."""

    tokens: int
    heads: int
    inner: int
    groups: int
    state: int
    batch: int

    @property
    def conv(self) -> int:
        """Return the channels of the convolution, [x, B, C]."""
        return self.inner + 2 * self.groups * self.state

    @property
    def rows(self) -> int:
        """Return the rows [z, x, B, C, dt]."""
        return self.inner + self.conv + self.heads

    def padded_tokens(self, chunk_tokens: int) -> int:
        """Return the tokens once every sequence is filled up to whole chunks."""
        length = self.tokens // self.batch
        return self.batch * -(-length // chunk_tokens) * chunk_tokens


@cache
def stage_layers(parent: ModelShape, pipeline: int) -> tuple[range, ...]:
    """Return the layer indices of every pipeline stage."""
    sizes = LayerPattern.parse(pipeline_pattern(parent, pipeline)).segments
    return tuple(range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True))


@cache
def copied_elements(cut: Cut, kind: LayerKind) -> int:
    """Count the weights a slice copies, because their kept rows do not lie in one run.

    Asks the code that cuts them, on tensors without storage.
    """
    rows, columns = PROJECTIONS[kind]
    copied = 0
    for kinds in ((rows, DimKind.HIDDEN), (DimKind.HIDDEN, columns)):
        layouts = [cut.grid(dim) for dim in kinds]
        weight = torch.empty([layout.full_size for layout in layouts], device="meta")
        kept = weight
        for dim, layout in reversed(list(enumerate(layouts))):
            kept = take(kept, dim, layout)
        copied += 0 if kept._base is weight or kept is weight else kept.numel()
    return copied
