"""What one layer sees of a choice: how wide to compute, what to multiply by, what to divide norms by.

Shapes: D hidden, K choices, L layers; lower case = this tensor-parallel rank's shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from elastic.model.cache import LayerMemory
from elastic.model.documents import Documents
from elastic.model.elementwise import TorchElementwise
from elastic.model.observe import LayerObserver
from elastic.model.recompute import between_products
from elastic.space.axes import AXES, LANES, Axis, LayerKind
from elastic.space.gates import Execution, Gates
from elastic.space.nesting import Cut, mask_table
from elastic.space.space import Space


class GatesError(ValueError):
    """Gates that this model cannot run."""


@dataclass(frozen=True)
class Width:
    """One axis of one layer: `vector` multiplies (None: all ones), `active` is its sum, the divisor of a norm."""

    active: Tensor | int
    vector: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Multiply the last dimension of `x`."""
        return x if self.vector is None else x * self.vector.to(x.dtype)


@dataclass(frozen=True)
class LayerGates:
    """Everything one layer needs: its cut, its width along every axis that it has, and whether it runs at all."""

    cut: Cut
    widths: Mapping[Axis, Width]
    depth: Tensor | None = None
    skipped: bool = False
    output: Tensor | None = None  # g_depth g_hidden [D] for attention, whose weight it multiplies; None: all ones

    def __getitem__(self, axis: Axis) -> Width:
        return self.widths[axis]

    @property
    def hidden(self) -> Width:
        """Return the width of the residual stream."""
        return self.widths[Axis.HIDDEN]


class ElasticLayer(nn.Module):
    """x + g_depth g_hidden F(norm(x)): norm and F are the submodules `norm_and_function` of Megatron-Core's layer."""

    norm_and_function: tuple[str, str]
    config: TransformerConfig

    def __init__(self, *args: Any, elementwise: TorchElementwise, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.elementwise = elementwise

    def forward(
        self,
        x: Tensor,
        gates: LayerGates,
        observer: LayerObserver | None = None,
        memory: LayerMemory | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map the stream [S, B, D] to the stream; `memory` is this layer's own."""
        norm, function = (getattr(self, name) for name in self.norm_and_function)

        def run(normalised: Tensor) -> Tensor:
            if observer is not None:
                observer.normalised(normalised)
            return function.forward_gated(normalised, gates, observer, memory, documents)

        y = between_products(self.config, partial(norm, x, gates.hidden), run)
        return self.add(x, y, gates)

    def add(self, x: Tensor, y: Tensor, gates: LayerGates) -> Tensor:
        """Return x + g_depth g_hidden y."""
        return self.elementwise.residual(x, y, gates.depth, gates.hidden.vector)


class Masks(nn.Module):
    """Turns a micro-batch's Gates into those of each layer; owns the 0/1 mask tables, built once."""

    def __init__(
        self, space: Space, layer_indices: tuple[int, ...], tensor_parallel: int, device: torch.device | None
    ) -> None:
        super().__init__()
        self.space, self.layer_indices, self.tensor_parallel = space, layer_indices, tensor_parallel
        for axis in space.elastic_axes():
            choices = space.axes[axis].choices
            if axis is Axis.DEPTH:
                table = space.depth_table()
            else:
                ranks = 1 if AXES[axis].parts is None else tensor_parallel
                local = [choice // ranks for choice in choices]
                table = mask_table(local, max(1, space.parts(axis) // ranks), local[0])
            self.register_buffer(f"{axis}_table", table.to(device), persistent=False)
            widths = torch.tensor([float(choice) for choice in choices], device=device)
            self.register_buffer(f"{axis}_widths", widths, persistent=False)

    def layers(self, gates: Gates | None) -> tuple[LayerGates, ...]:
        """Return what each layer sees (None: the whole parent, all ones).

        Raises GatesError for an axis without choices or a wrong weight shape, ShapeError or SubnetError for a subnet
        that the parent does not have.
        """
        gates = Gates.mask({}) if gates is None else gates
        self._check(gates)
        shape, subnet = self.space.parent, gates.subnet
        mixed = cache(lambda axis, slot: self._mix(axis, gates.weights[axis][slot]))  # layers may share a slot
        depths = self._depths(gates)
        hidden = mixed(Axis.HIDDEN, 0).vector if Axis.HIDDEN in gates.weights else None
        outputs = self._attention_outputs(depths, hidden)
        layers = []
        for layer_index in self.layer_indices:
            full, ordinal = shape.layer_widths(layer_index), shape.pattern.ordinal(layer_index)
            kept = full if subnet is None else subnet.layer_widths(shape, layer_index)
            cut = Cut.of_layer(shape, layer_index, kept, lanes=self.space.lanes, tensor_parallel=self.tensor_parallel)
            widths = {
                axis: mixed(axis, self.space.slot(axis, ordinal)) if axis in gates.weights else Width(width)
                for axis, width in kept.items()
            }
            skipped = subnet is not None and layer_index not in subnet.kept_layers
            layers.append(LayerGates(cut, widths, depths.get(layer_index), skipped, outputs.get(layer_index)))
        return tuple(layers)

    def _depths(self, gates: Gates) -> dict[int, Tensor]:
        """Return the depth gate of each layer, if there is any."""
        if Axis.DEPTH not in gates.weights or not self.layer_indices:
            return {}
        here = self.get_buffer("depth_table")[:, self.layer_indices[0] : self.layer_indices[-1] + 1]
        mixed = (gates.weights[Axis.DEPTH][0][:, None] * here).sum(dim=0)
        return dict(zip(self.layer_indices, mixed.unbind(), strict=True))

    def _attention_outputs(self, depths: Mapping[int, Tensor], hidden: Tensor | None) -> dict[int, Tensor]:
        """Return what the output of each attention layer is multiplied by, made at once for all, if by anything."""
        kinds = self.space.parent.pattern.kinds
        here = [layer_index for layer_index in self.layer_indices if kinds[layer_index] is LayerKind.ATTENTION]
        if not here or not depths:
            return {} if hidden is None else dict.fromkeys(here, hidden)
        columns = torch.stack([depths[layer_index] for layer_index in here])[:, None]
        mixed = columns.expand(-1, self.space.parent.hidden) if hidden is None else columns * hidden
        return dict(zip(here, mixed.unbind(), strict=True))

    def _mix(self, axis: Axis, weights: Tensor) -> Width:
        """Return sum_k w_k I_k (eq. 51) and its sum; exact 0/1 where w is one-hot."""
        # Elementwise in fp32 rather than a matrix product: no reduced-precision units round the mask.
        vector = (weights[:, None] * self.get_buffer(f"{axis}_table")).sum(dim=0)
        return Width((weights * self.get_buffer(f"{axis}_widths")).sum(), vector)

    def _check(self, gates: Gates) -> None:
        if gates.execution is Execution.SLICE:
            if gates.subnet is None or gates.weights:
                raise GatesError("slice execution takes a subnet and no weights; use Gates.slice(subnet)")
            gates.subnet.shape(self.space.parent)
            lanes = self.space.lanes
            for axis in (axis for axis, entry in AXES.items() if entry.parts == LANES):
                widths = gates.subnet.axis_widths(axis)
                if any(width % lanes for width in widths):
                    raise GatesError(f"{axis}: widths {widths} must be multiples of {lanes}, the number of lanes")
            return
        if gates.subnet is not None:
            raise GatesError("mask execution takes weights and no subnet; use Gates.mask(weights)")
        for axis, weights in gates.weights.items():
            expected = (self.space.num_slots(axis), len(self.space.axes[axis].choices))
            if axis not in self.space.elastic_axes() or tuple(weights.shape) != expected:
                raise GatesError(
                    f"gates: axis {axis} has weights of shape {tuple(weights.shape)}, this space expects {expected} "
                    f"over the choices {list(self.space.axes[axis].choices)}; leave out an axis that is not elastic"
                )
