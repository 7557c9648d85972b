"""The verb measure_latency: times of layers over the choices of a space, on the execution a deployed submodel has.

Every grid point is a small model of its own weights, of one kind of layer, run as elastic/generate runs a submodel:
with caches, batch by batch. Models of one kind take turns, so that whatever else the machine does meets all alike.

Shapes: B batch, S new tokens, D hidden, V vocab.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from elastic.config.latency import LatencyConfig
from elastic.config.load import config_dict
from elastic.hf.folder import HfFolder, HfFolderError, open_hf_folder
from elastic.model.cache import CallMemory, ModelCache, empty_cache
from elastic.model.forward import gathered_logits
from elastic.model.model import ElasticModel, build_model
from elastic.space.axes import AXES, Axis, LayerKind
from elastic.space.cost import Deployment, layer_cost, shape_cost
from elastic.space.gates import Gates
from elastic.space.latency import (
    SIZES,
    Check,
    Conditions,
    LatencyTable,
    Machine,
    Measured,
    Part,
    Timed,
    grid_of,
    part_axes,
    parts_of,
)
from elastic.space.reach import smallest_subnet
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import Space
from elastic.verbs.generate import load_hf_model
from elastic.verbs.parent import nested_parent
from elastic.verbs.report_file import check_output, write_output
from elastic.world.groups import DTYPES, Layout, world

COLD_BYTES = 2**28  # more than a cache holds: a model that is larger reads its weights from memory in every pass
# A step of about 0.01, as trained models have: by larger ones the decay over a chunk of the scan becomes a denormal
# number, which processors are slow with.
DT_BIAS = -4.6
LEAST_MS = 5.0  # of one reading of the clock: shorter passes are run several times
Work = Callable[[], object]


class MeasureError(ValueError):
    """Layers that this device has no memory for, or exports that cannot be timed beside a table."""


class Deployed:
    """A model of its own weights, all full, whose passes a Decoder's would be (elastic/generate/batch.py)."""

    def __init__(self, model: ElasticModel) -> None:
        self.model, self.shape, self.dtype = model.eval(), model.decoder.masks.space.parent, model.config.params_dtype
        self.device, self.gates = next(model.parameters()).device, Gates.slice(Subnet.full(self.shape))

    @classmethod
    def of_sizes(cls, shape: ModelShape, dtype: torch.dtype) -> "Deployed":
        """Make one of these sizes."""
        model = build_model(Space(shape, {}, lanes=1), Layout(dtype=dtype), seed=None)
        for name, parameter in model.named_parameters():  # numbers that stay numbers through any depth
            parameter.data.fill_(DT_BIAS if name.endswith("dt_bias") else 0.01)
        return cls(model)

    def layers(self, at: Conditions) -> Work:
        """Return the pass through the layers alone."""
        decoder, fill, ids = self.model.decoder, self._caches(at), self._ids(at)
        stream = torch.randn(at.num_new, at.batch, self.shape.hidden, device=self.device).to(self.dtype)

        def work() -> Tensor:
            x, cache = stream, fill()
            memory = CallMemory(cache.layers, cache.next_tokens(ids, None))
            for layer, own, index in zip(
                decoder.layers, decoder.masks.layers(self.gates), decoder.masks.layer_indices, strict=True
            ):
                x = layer(x, own, None, memory.of(index))
            return x

        return work

    def rest(self, at: Conditions) -> Work:
        """Return the pass through embedding, final norm and head."""
        ids, hidden = self._ids(at), self.model.decoder.masks.layers(self.gates)[0].hidden

        def work() -> Tensor:
            embedded = self.model.embedding(input_ids=ids, position_ids=None)
            return self._logits(self.model.decoder.final_norm(embedded, hidden))

        return work

    def whole(self, at: Conditions) -> Work:
        """Return the pass through everything."""
        ids, fill = self._ids(at), self._caches(at)
        return lambda: self._logits(self.model(ids, self.gates, cache=fill()))

    def _logits(self, x: Tensor) -> Tensor:
        """Map final hidden states [S, B, D] to the logits of the last token [B, V], fp32."""
        return gathered_logits(x[-1], self.model.head_weight(self.gates), self.model.pg_collection.tp).float()

    def _ids(self, at: Conditions) -> Tensor:
        return torch.zeros(at.batch, at.num_new, dtype=torch.int64, device=self.device)

    def _caches(self, at: Conditions) -> Callable[[], ModelCache]:
        """Return what gives the caches as they are before a pass: full up to the tokens that are there already."""
        capacity, full = at.length_tokens + 1, Subnet.full(self.shape)
        cache = empty_cache(self.shape, full, capacity, batch=at.batch, dtype=self.dtype, device=self.device)
        before = (at.length_tokens if at.timed == "decode" else 0,) * at.batch

        def fill() -> ModelCache:
            cache.lengths = before
            return cache

        return fill


def run_measure_latency(config: LatencyConfig, console: Console) -> LatencyTable:
    """Time every kind of layer at every choice; print a summary, write the table. Returns it.

    Reads no data, and no weights but those of `measure.folders`, which are timed instead: the given table has these
    checks more. Raises RecordError for a permuted parent of another model, OutputError for an output that exists
    already, MeasureError for a folder that the table says nothing of, and where the device's memory is too small.
    """
    check_output(config)
    space, given, deployment = nested_parent(config)[1], config.measure, config.elastic.deployment
    if given.folders:
        table = timed_exports(config, space.parent)
        return _told(table, table.checks[-len(given.folders) - 1 :], config, console)
    passes: list[Timed] = ["decode", "prefill"]
    batches, lengths = given.batches or (deployment.batch,), given.lengths or (deployment.length_tokens,)
    conditions = [Conditions(*one) for one in dict.fromkeys(itertools.product(passes, batches, lengths))]
    with world(Layout(dtype=DTYPES[config.trainer.precision])), torch.no_grad():
        try:
            table = measured_table(space, conditions, config.trainer.precision, given.rounds, console)
            if given.whole:
                ends = {"parent": space.parent, "smallest": smallest_subnet(space).shape(space.parent)}
                whole = {name: Deployed.of_sizes(shape, DTYPES[table.precision]) for name, shape in ends.items()}
                table = replace(table, checks=checks(table, whole, conditions, given.rounds))
        except torch.OutOfMemoryError as error:
            rule = "the layers of all choices take turns, and are held at once"
            remedy = "give smaller measure.batches or measure.lengths, fewer choices, or measure.whole=false"
            raise MeasureError(f"out of memory: {rule}; {remedy}") from error
    return _told(table, table.checks, config, console)


def timed_exports(config: LatencyConfig, parent: ModelShape) -> LatencyTable:
    """Time the folders that `measure.folders` names, in turn with the parent; returns the table with these checks more.

    What the table says is said of what is run: the padded widths of a folder. Raises MeasureError, before anything is
    timed, where there is no table, and for a folder that it says nothing of.
    """
    given, deployment = config.measure, config.elastic.deployment
    table, measured, opened = deployment.latency, deployment.measured, dict[str, HfFolder]()
    if table is None or measured is None:
        raise MeasureError(
            f"measure.folders = {list(given.folders)}: needs a table; set elastic.deployment.latency=FILE"
        )
    for path in given.folders:
        try:
            opened[path] = open_hf_folder(Path(path))
        except HfFolderError as error:
            raise MeasureError(f"measure.folders: {error}\ngive a folder that recipes/extract.py wrote") from error
        own = opened[path].shape
        rules = [*table.problems(own.with_vocab(parent.vocab))]  # an export leaves filled up rows out
        if not rules and shape_cost(own, deployment).latency_ms is None:
            rules = ["was measured for other widths"]
        if rules:
            raise MeasureError(f"measure.folders = {path}: the table {rules[0]}; give an export of this family")
    layout = Layout(dtype=DTYPES[table.precision])
    with world(layout), torch.no_grad():
        models = {"parent": Deployed.of_sizes(parent, layout.dtype)}
        models |= {path: Deployed(load_hf_model(folder, layout)) for path, folder in opened.items()}
        return replace(table, checks=(*table.checks, *checks(table, models, [measured], given.rounds)))


def _told(table: LatencyTable, found: Sequence[Check], config: LatencyConfig, console: Console) -> LatencyTable:
    """Return the table once it is written, and what the clock said of whole models is printed, with their shares."""
    of_parent = {one.conditions: one.table_ms for one in found if one.name == "parent"}
    for one in found:
        off, line = one.table_ms / one.clock_ms - 1, f"{one.name} whole, {one.conditions}: {one.clock_ms:.4g} ms"
        line += f", by the table {one.table_ms:.4g} ({off:+.1%})"
        if one.of_parent is not None and one.name != "parent":
            share = one.table_ms / of_parent[one.conditions]
            off = share / one.of_parent - 1
            line += f"; of the parent's time {one.of_parent:.3f}, by the table {share:.3f} ({off:+.1%})"
        console.print(line, highlight=False, soft_wrap=True)
    write_output(config, config_dict(table), console)
    return table


def measured_table(
    space: Space, conditions: list[Conditions], precision: str, rounds: int, console: Console
) -> LatencyTable:
    """Measure all parts of the parent at all widths of the space; process groups must exist."""
    parent, dtype = space.parent, DTYPES[precision]
    widths = grid_of(parent, {axis: own.choices for axis, own in space.axes.items()})
    layer_ms: dict[Conditions, dict[Part, tuple[float, ...]]] = {at: {} for at in conditions}
    spreads: dict[Conditions, dict[Part, tuple[float, ...]]] = {at: {} for at in conditions}
    for part in parts_of(parent):
        points = list(itertools.product(*(widths[axis] for axis in part_axes(part))))
        shapes = [part_shape(parent, part, dict(zip(part_axes(part), point, strict=True)), dtype) for point in points]
        models = [Deployed.of_sizes(shape, dtype) for shape in shapes]
        for at in conditions:
            works = {n: (one.rest if part == "rest" else one.layers)(at) for n, one in enumerate(models)}
            times = in_turn(works, rounds, models[0].device)
            per_layer = [1 if part == "rest" else len(shape.pattern) for shape in shapes]
            layer_ms[at][part] = tuple(statistics.median(times[n]) / count for n, count in enumerate(per_layer))
            spreads[at][part] = tuple(spread(times[n]) for n in range(len(points)))
            low, high = min(layer_ms[at][part]), max(layer_ms[at][part])
            console.print(
                f"{part}: {at.timed} of {at.batch} x {at.length_tokens:,} tokens, {len(points)} widths: {low:.4g} to "
                f"{high:.4g} ms, rounds differ by {statistics.median(spreads[at][part]):.1%}",
                highlight=False,
            )
    rows = [Measured(**vars(at), layer_ms=layer_ms[at], spread=spreads[at]) for at in conditions]
    sizes = {name: getattr(parent, name) for name in SIZES}
    return LatencyTable(Machine.here(), precision, sizes, widths, tuple(rows))  # type: ignore[arg-type]


def part_shape(parent: ModelShape, part: Part, widths: dict[Axis, int], dtype: torch.dtype) -> ModelShape:
    """Return a model of one kind of layer at these widths: as many as the parent has, or as outgrow a cache."""
    kind = parent.pattern.kinds[0] if part == "rest" else LayerKind[part.upper()]
    own = Subnet.full(parent).layer_widths(parent, parent.pattern.layers_of(kind)[0]) | widths
    num_bytes = layer_cost(parent, kind, own, 1)[0] * dtype.itemsize
    num_layers = 1 if part == "rest" else math.ceil(COLD_BYTES / num_bytes)
    full = Subnet.full(parent)
    sizes: dict[str, Any] = {
        entry.size: (width,) * len(getattr(full, entry.size)) if entry.own else width
        for axis, entry in AXES.items()
        if (width := own.get(axis)) is not None
    }
    return replace(full, **sizes, kept_layers=parent.pattern.layers_of(kind)[:num_layers]).shape(parent)


def checks(
    table: LatencyTable, models: Mapping[str, Deployed], conditions: Sequence[Conditions], rounds: int
) -> tuple[Check, ...]:
    """Time whole models in turn, one of them `parent`, beside what the table says; process groups must exist."""
    found = []
    for at in conditions:
        times = in_turn({name: model.whole(at) for name, model in models.items()}, rounds, models["parent"].device)
        deployment = Deployment(at.batch, at.length_tokens, timed=at.timed, latency=table)
        for name, model in models.items():
            used = shape_cost(model.shape, deployment).latency_ms
            assert used is not None, "the table was measured for this space"
            of_parent = statistics.median(map(truediv, times[name], times["parent"]))
            found.append(Check(name, at.conditions, float(used), statistics.median(times[name]), of_parent))
    return tuple(found)


def in_turn[K: Hashable](works: Mapping[K, Work], rounds: int, device: torch.device) -> dict[K, list[float]]:
    """Time every work once a round, in turn, back and forth; returns milliseconds of one pass by round."""
    repeats: dict[K, int] = {}
    for name, work in works.items():
        elapsed_ms(work, device)  # compiles and tunes kernels
        repeats[name] = max(1, math.ceil(LEAST_MS / max(elapsed_ms(work, device), LEAST_MS / 100)))
    times: dict[K, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name in works if index % 2 else reversed(list(works)):
            times[name].append(elapsed_ms(works[name], device, repeats[name]))
    return times


def elapsed_ms(work: Work, device: torch.device, repeats: int = 1) -> float:
    """Run `repeats` times in a row; returns milliseconds of one, on a GPU until it is done.

    Of one thread on a processor its own time: what others compute meanwhile is theirs, not the model's.
    """
    on_gpu = device.type == "cuda"
    wait: Callable[[torch.device], None] = torch.cuda.synchronize if on_gpu else lambda device: None
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.thread_time
    wait(device)
    started_s = clock()
    for _ in range(repeats):
        work()
    wait(device)
    return 1e3 * (clock() - started_s) / repeats


def spread(times: list[float]) -> float:
    """Return how far apart the middle half lies, as a share of the median."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle
