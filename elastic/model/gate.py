"""What one layer sees of a choice: how wide to compute, what to multiply by, what to divide norms by.

Shapes: D hidden, K choices, L layers; lower case = this tensor-parallel rank's shard.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic.space.axes import KIND_OF_AXIS, Axis, Space
from elastic.space.gates import Execution, Gates
from elastic.space.nesting import Cut, mask_table
from elastic.space.pattern import LayerKind


class GatesError(ValueError):
    """Gates that this model cannot run."""


@dataclass(frozen=True)
class WidthGate:
    """One axis of one layer: `vector` multiplies (None: all ones), `active` is its sum, the divisor of a norm."""

    active: Tensor | int
    vector: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Multiply the last dimension of `x`."""
        return x if self.vector is None else x * self.vector.to(x.dtype)


@dataclass(frozen=True)
class LayerGate:
    """Everything one layer needs: its cut, the hidden stream, its inner axes and whether it runs at all."""

    cut: Cut
    hidden: WidthGate
    inner: WidthGate
    channels: WidthGate
    depth: Tensor | None = None
    skipped: bool = False

    @property
    def residual_scale(self) -> Tensor | None:
        """Return depth gate times hidden gate, what multiplies a layer's output, or None for all ones."""
        if self.depth is None or self.hidden.vector is None:
            return self.hidden.vector if self.depth is None else self.depth
        return self.depth * self.hidden.vector


@dataclass(frozen=True)
class StreamGates:
    """The resolved gates of one micro-batch on one pipeline stage."""

    hidden: WidthGate
    width: int
    layers: tuple[LayerGate, ...]


def residual(x: Tensor, y: Tensor, gate: LayerGate) -> Tensor:
    """Add a layer's gated output to the stream: x + depth * hidden * y."""
    scale = gate.residual_scale
    return x + y if scale is None else torch.addcmul(x, y, scale.to(y.dtype))


class GateResolver(nn.Module):
    """Turns a micro-batch's Gates into per-layer gates; owns the 0/1 mask tables, built once."""

    def __init__(
        self, space: Space, layer_indices: tuple[int, ...], tensor_parallel: int, device: torch.device | None
    ) -> None:
        super().__init__()
        self.space, self.layer_indices, self.tensor_parallel = space, layer_indices, tensor_parallel
        shape = space.parent
        repeats = {
            Axis.HIDDEN: (1, shape.hidden),
            Axis.MAMBA_CHANNEL: (1, shape.head_channels),
            Axis.FFN: (space.lanes, space.full_width(Axis.FFN) // space.lanes),
            Axis.MAMBA_HEAD: (shape.mamba_groups, space.full_width(Axis.MAMBA_HEAD) // shape.mamba_groups),
            Axis.ATTENTION_HEAD: (shape.kv_heads, space.full_width(Axis.ATTENTION_HEAD) // shape.kv_heads),
        }
        for axis in space.elastic_axes():
            choices = space.axes[axis].choices
            if axis is Axis.DEPTH:
                kept = [set(space.kept_layers(depth)) for depth in choices]
                table = torch.tensor(
                    [[float(layer in layers) for layer in range(len(shape.pattern))] for layers in kept]
                )
            else:
                count, length = repeats[axis]
                local = count // tensor_parallel if axis in KIND_OF_AXIS else count
                table = mask_table([choice * local // count for choice in choices], local, length)
            self.register_buffer(f"{axis}_table", table.to(device), persistent=False)
            widths = torch.tensor([float(choice) for choice in choices], device=device)
            self.register_buffer(f"{axis}_widths", widths, persistent=False)

    def full(self) -> StreamGates:
        """Resolve to the ungated parent."""
        return self.resolve(Gates(Execution.MASK))

    def resolve(self, gates: Gates) -> StreamGates:
        """Resolve one micro-batch's gates; raises GatesError for an axis without choices or a wrong weight shape."""
        self._check(gates)
        shape, subnet = self.space.parent, gates.subnet
        if gates.execution is Execution.SLICE:
            assert subnet is not None
            hidden, channels = WidthGate(subnet.hidden), WidthGate(subnet.head_channels)
            width, p = subnet.hidden, subnet.head_channels
        else:
            hidden = self._mix(gates, Axis.HIDDEN, 0, shape.hidden)
            channels = self._mix(gates, Axis.MAMBA_CHANNEL, 0, shape.head_channels)
            width, p = shape.hidden, shape.head_channels
        layers = []
        for layer_index in self.layer_indices:
            full = shape.width(layer_index)
            kept = full if subnet is None else subnet.width(shape, layer_index)
            cut = Cut.of_layer(
                shape,
                layer_index,
                kept,
                hidden=width,
                head_channels=p,
                lanes=self.space.lanes,
                tensor_parallel=self.tensor_parallel,
            )
            depth, skipped, inner = None, False, WidthGate(kept)
            if gates.execution is Execution.SLICE:
                skipped = subnet is not None and layer_index not in subnet.kept_layers
            else:
                axis = _axis_of(shape.pattern.kinds[layer_index])
                inner = self._mix(gates, axis, self.space.slot(axis, shape.pattern.ordinal(layer_index)), full)
                if Axis.DEPTH in gates.weights:
                    depth = (gates.weights[Axis.DEPTH][0] * self.get_buffer("depth_table")[:, layer_index]).sum()
            layers.append(LayerGate(cut, hidden, inner, channels, depth, skipped))
        return StreamGates(hidden, width, tuple(layers))

    def _mix(self, gates: Gates, axis: Axis, slot: int, full: int) -> WidthGate:
        """Return sum_k w_k I_k (eq. 51) and its sum; exact 0/1 where w is one-hot."""
        if axis not in gates.weights:
            return WidthGate(full)
        weights = gates.weights[axis][slot]
        # Elementwise in fp32 rather than a matrix product: no reduced-precision units round the mask.
        vector = (weights[:, None] * self.get_buffer(f"{axis}_table")).sum(dim=0)
        return WidthGate((weights * self.get_buffer(f"{axis}_widths")).sum(), vector)

    def _check(self, gates: Gates) -> None:
        if gates.execution is Execution.SLICE:
            if gates.subnet is None or gates.weights:
                raise GatesError("slice execution takes a subnet and no weights; use Gates.slice(subnet)")
            gates.subnet.shape(self.space.parent)
            lanes = self.space.multiple(Axis.FFN)
            if any(width % lanes for width in gates.subnet.ffn):
                raise GatesError(f"ffn: widths {gates.subnet.ffn} must be multiples of {lanes}, the number of lanes")
            return
        if gates.subnet is not None:
            raise GatesError("mask execution takes weights and no subnet; use Gates.mask(weights)")
        for axis, weights in gates.weights.items():
            expected = (self.space.num_slots(axis), len(self.space.axes[axis].choices))
            if not self.space.is_elastic(axis) or tuple(weights.shape) != expected:
                raise GatesError(
                    f"gates: axis {axis} has weights of shape {tuple(weights.shape)}, this space expects {expected} "
                    f"over the choices {list(self.space.axes[axis].choices)}; leave out an axis that is not elastic"
                )


def _axis_of(kind: LayerKind) -> Axis:
    return next(axis for axis, other in KIND_OF_AXIS.items() if other is kind)
