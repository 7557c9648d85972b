"""Times of layers that were measured over a grid of widths, and what they say of every width between.

A width between two of the grid stands for a share of each. The time of a layer is linear in the shares along each of
its axes, and so in choice probabilities: a router is trained on the expected time itself.

Legend: ... any leading dimensions, K widths, n widths of the grid along an axis, L layers.
"""

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from elastic.space.axes import AXES, Axis, LayerKind
from elastic.space.layers import Number
from elastic.space.ranges import Length, Range, Sequences, Size, Threads, Vocab
from elastic.space.shape import ModelShape, Subnet

Part = Literal["mamba", "mlp", "attention", "rest"]  # the rest: embedding, final norm and head
Timed = Literal["decode", "prefill"]
Milliseconds = Annotated[float, Range(0, 1e9, open_low=True)]
Spread = Annotated[float, Range(0, 1e6)]
# Of an axis and a layer: the widths it may have, and their probabilities, or the one it has.
Behind = Callable[[Axis, int], tuple[tuple[int, ...], Tensor | int]]
# What no axis narrows, and a time depends on.
SIZES = ("vocab", "mamba_groups", "mamba_state", "conv_kernel", "kv_heads", "attention_channels")


@dataclass(frozen=True)
class Machine:
    """Where times were measured."""

    name: str
    device: str
    threads: Threads
    torch: str

    @classmethod
    def here(cls) -> "Machine":
        """Describe this machine: its GPU, or its processor and how many threads compute."""
        info = Path("/proc/cpuinfo")
        models = (line.partition(":")[2].strip() for line in _lines(info) if line.startswith("model name"))
        processor = next(models, platform.processor() or platform.machine())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
        return cls(platform.node() or "unnamed", device, torch.get_num_threads(), torch.__version__)

    def differences(self, other: "Machine") -> list[str]:
        """Say in what another machine computes otherwise; its name alone does not matter."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("device", "threads", "torch")}
        return [f"{name} {theirs}, not {ours}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


@dataclass(frozen=True)
class Conditions:
    """One pass. Prefill: all `length_tokens` tokens of `batch` sequences at once; decode: the one token after them."""

    timed: Timed
    batch: Sequences
    length_tokens: Length

    @property
    def num_new(self) -> int:
        """Return the tokens of one sequence that the pass reads or writes."""
        return self.length_tokens if self.timed == "prefill" else 1

    @property
    def conditions(self) -> str:
        """Say what is measured."""
        return f"{self.timed} of {self.batch} x {self.length_tokens:,} tokens"


@dataclass(frozen=True)
class Measured(Conditions):
    """Median times of one pass, and how far apart the middle half of its rounds lay, as a share of the median.

    A part has one time for each combination of the grid's widths along its axes, in the order of AXES, the last the
    fastest.
    """

    layer_ms: Mapping[Part, tuple[Milliseconds, ...]]
    spread: Mapping[Part, tuple[Spread, ...]]


@dataclass(frozen=True)
class Check:
    """A whole model: what the table says of one pass, and what the clock said; medians of the rounds.

    `of_parent` is the clock's time over the parent's in the same round: what else the machine did met both.
    """

    name: str
    conditions: str
    table_ms: Milliseconds
    clock_ms: Milliseconds
    of_parent: Milliseconds | None = None


@dataclass(frozen=True)
class LatencyTable:
    """What recipes/measure_latency.py writes: times of one layer of every kind, and of what is not in layers.

    `widths` is the grid, ascending, `sizes` what else the layers had (SIZES), `checks` whole models timed as one.
    """

    machine: Machine
    precision: Literal["fp32", "bf16"]
    sizes: Mapping[str, Vocab]
    widths: Mapping[Axis, tuple[Size, ...]]
    measured: tuple[Measured, ...]
    checks: tuple[Check, ...] = ()

    def at(self, timed: str, batch: int, length_tokens: int) -> Measured | None:
        """Return what was measured under these conditions, if it was."""
        wanted = timed, batch, length_tokens
        return next((one for one in self.measured if (one.timed, one.batch, one.length_tokens) == wanted), None)

    def problems(self, parent: ModelShape) -> Iterator[str]:
        """Say why the table says nothing of a parent and its subnets: it is of another model, or incomplete."""
        for name in SIZES:
            ours, theirs = getattr(parent, name), self.sizes.get(name)
            if ours != theirs:
                yield f"was measured with {name} = {theirs}, the parent has {ours}"
        for axis, grid in self.widths.items():
            if not grid or any(later <= earlier for earlier, later in pairwise(grid)):
                yield f"has {axis} widths {list(grid)}, which must ascend"
        for part in parts_of(parent):
            if missing := [axis for axis in part_axes(part) if axis not in self.widths]:
                yield f"has no widths of {', '.join(missing)}"
                return
            count = math.prod(len(self.widths[axis]) for axis in part_axes(part))
            for one in self.measured:
                if len(one.layer_ms.get(part, ())) != count:
                    found = len(one.layer_ms.get(part, ()))
                    yield f"holds {found} times of {part} for {one.conditions}, its widths make {count}"

    def outside(self, axis: Axis, widths: Sequence[int]) -> list[int]:
        """List the widths that lie below or above the grid: nothing was measured on their other side."""
        grid = self.widths[axis]
        return [width for width in widths if not grid[0] <= width <= grid[-1]]

    def shares(self, axis: Axis, widths: tuple[int, ...], device: torch.device) -> Tensor:
        """Return how much each width of the grid stands for each of `widths`: [K, n], fp64, brought to a device once.

        A copy to a GPU waits for it, and the router's loss asks at every step.
        """
        key = axis, widths, device
        if key not in self._tensors:
            assert not self.outside(axis, widths), "the rules of the config let no width outside the grid through"
            grid, table = self.widths[axis], torch.zeros(len(widths), len(self.widths[axis]), dtype=torch.float64)
            for row, width in enumerate(widths):
                above = next(index for index, one in enumerate(grid) if one >= width)
                below = above if grid[above] == width else above - 1
                share = 1.0 if above == below else (width - grid[below]) / (grid[above] - grid[below])
                table[row, below] = 1.0 - share
                table[row, above] = share
            self._tensors[key] = table.to(device)
        return self._tensors[key]

    def part_ms(self, measured: Measured, part: Part, shares: Sequence[Tensor]) -> Tensor:
        """Mix the times of a part, fp64 [..., L], by the shares [..., L, n] along each of its axes."""
        device = shares[0].device
        key = measured.timed, measured.batch, measured.length_tokens, part, device
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(measured.layer_ms[part], dtype=torch.float64).to(device)
        first, *others = shares
        mixed = first @ self._tensors[key].view(first.shape[-1], -1)  # [..., L, the grid of the other axes]
        for own in others:
            mixed = (own.unsqueeze(-2) @ mixed.unflatten(-1, (own.shape[-1], -1))).squeeze(-2)
        return mixed.squeeze(-1)

    def total_ms(self, measured: Measured, parent: ModelShape, behind: Behind, keep: Sequence[Number]) -> Number | None:
        """Sum up the times of the layers that run and of the rest; None if some width lies beside the grid.

        `behind` gives for an axis and a layer's number among its kind the widths it may have with their probabilities
        [..., K], or the one it has; `keep` the probability that each layer runs. Layers alike are looked up once.
        """
        axes = {axis: part for part in parts_of(parent) for axis in part_axes(part)}
        layers = {axis: len(getattr(parent, AXES[axis].size)) if AXES[axis].own else 1 for axis in axes}
        chosen = {(axis, n): behind(axis, n) for axis, count in layers.items() for n in range(count)}
        if any(self.outside(axis, choices) for (axis, _), (choices, _) in chosen.items()):
            return None
        tensors = (one for one in (*(own for _, own in chosen.values()), *keep) if isinstance(one, Tensor))
        like, seen = next(tensors, None), dict[tuple[Axis, int], Tensor]()
        device = torch.device("cpu") if like is None else like.device

        def on_grid(axis: Axis, ordinal: int) -> Tensor:
            """Return how much each width of the grid stands for a layer's, [..., n]; one tensor for one choice."""
            choices, own = chosen[axis, ordinal if AXES[axis].own else 0]
            key = axis, id(own) if isinstance(own, Tensor) else own
            if key not in seen:
                shares = self.shares(axis, choices, device)
                seen[key] = own @ shares if isinstance(own, Tensor) else shares[0]
            return seen[key]

        total: Number = self.part_ms(measured, "rest", [on_grid(Axis.HIDDEN, 0)[..., None, :]])[..., 0]
        for kind in LayerKind:
            part, found = part_of(kind), dict[tuple[int, ...], tuple[list[Tensor], Number]]()
            for ordinal, layer in enumerate(parent.pattern.layers_of(kind)):
                shares = [on_grid(axis, ordinal) for axis in part_axes(part)]
                key = tuple(map(id, shares))
                found[key] = shares, keep[layer] + (found[key][1] if key in found else 0)
            if found:
                columns = [
                    torch.stack(own, dim=-2) for own in zip(*(shares for shares, _ in found.values()), strict=True)
                ]
                times = self.part_ms(measured, part, columns).unbind(-1)
                total = total + sum(ms * runs for ms, (_, runs) in zip(times, found.values(), strict=True))
        return float(total) if like is None else total

    @cached_property
    def _tensors(self) -> dict[tuple[object, ...], Tensor]:
        return {}


def part_axes(part: Part) -> tuple[Axis, ...]:
    """List the axes that the time of a part depends on, in the order of AXES."""
    kinds = (None,) if part == "rest" else (None, LayerKind[part.upper()])
    return tuple(axis for axis, entry in AXES.items() if entry.kind in kinds)


def part_of(kind: LayerKind) -> Part:
    """Return what a layer kind is called in a table."""
    return {LayerKind.MAMBA: "mamba", LayerKind.MLP: "mlp", LayerKind.ATTENTION: "attention"}[kind]  # type: ignore[return-value]


def parts_of(parent: ModelShape) -> tuple[Part, ...]:
    """List the parts that a model has: its kinds of layers, and the rest."""
    return (*(part_of(kind) for kind in LayerKind if parent.pattern.layers_of(kind)), "rest")


def grid_of(parent: ModelShape, choices: Mapping[Axis, Sequence[int]]) -> dict[Axis, tuple[int, ...]]:
    """Return the widths that a parent and its choices have along every axis that it has layers for, ascending."""
    full = Subnet.full(parent)
    needed = {axis for part in parts_of(parent) for axis in part_axes(part)}
    return {axis: tuple(sorted({*full.axis_widths(axis), *choices.get(axis, ())})) for axis in AXES if axis in needed}
