"""What a config may leave to its parent: the sizes of the model, and choices given as shares of its widths."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic.checkpoint.contents import CheckpointError
from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record, RecordError, check_same_shape
from elastic.config.load import NOT_GIVEN, Problem, load_with_problems
from elastic.config.sections import ModelConfig, ParallelConfig
from elastic.config.verbs import CostConfig, ElasticConfig, ElasticRunConfig
from elastic.hf.config import export_warnings
from elastic.space.axes import AXES, INNER_AXIS, Axis, LayerKind
from elastic.space.shape import ModelShape, ShapeError
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import World

DEFAULT_LANES = 8
# A choice may lie this share of the full width beside what was asked for, if kernels like it better there. Ours.
ROOM = 1 / 16
TILE = 64  # what GEMM kernels fill; a width with fewer factors of 2 is served worse
OPEN: tuple[object, ...] = (None, NOT_GIVEN, {})


def fill_from_parent(
    kind: type, values: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Problem, ...], frozenset[str]]:
    """Return the values with what the parent decides filled in, the problems of that, and sections that stay unknown.

    1. `model`, as far as it is not given, is the checkpoint's; what is given is compared later (model_problems).
    2. An axis with `shares` instead of `choices` gets choices; `lanes` null is the checkpoint's.

    Only for verbs that describe a run of the main job. A checkpoint that cannot be opened is reported elsewhere.
    """
    filled, problems, unknown = dict(values), list[Problem](), frozenset[str]()
    if not issubclass(kind, ElasticRunConfig):
        return filled, (), unknown
    path, given = _section(values, "init_from").get("permuted_parent"), values.get("model")
    record = _record(path)
    if record is not None and (given in OPEN or isinstance(given, Mapping)):
        try:
            known = model_values(record.shape)
            filled["model"] = known | {key: value for key, value in (given or {}).items() if value not in OPEN}
        except ShapeError:
            pass  # model_problems says so
    elif given in OPEN and issubclass(kind, CostConfig) and path in OPEN:
        rule = "missing, and no checkpoint says how large the parent is"
        remedy = "set init_from.permuted_parent=RUN, or its sizes, model.hidden=..."
        problems.append(Problem("model", None, rule, remedy))
    if filled.get("model") in OPEN:
        unknown |= {"model", "elastic"}
    section = _section(values, "elastic", "space")
    if not section:
        return filled, tuple(problems), unknown
    axes = {name: axis for name, axis in section.items() if name in list(Axis) and isinstance(axis, Mapping)}
    # An override of choices leaves the shares of the file beside them: choices win.
    chosen = {name: axis for name, axis in axes.items() if axis.get("choices")}
    section = {
        **section,
        **{name: {key: axis[key] for key in axis if key != "shares"} for name, axis in chosen.items()},
    }
    shared = [Axis(name) for name in axes if "shares" in section[name]]
    lanes = section.get("lanes") or (DEFAULT_LANES if record is None else record.lanes)
    space = dict(section) | dict.fromkeys(shared) | {"lanes": lanes}
    if shared and "elastic" not in unknown:
        made, found = _made_choices(shared, section, lanes, filled)
        space |= made
        problems += found
        unknown |= frozenset() if made or not found else {"elastic"}
    filled["elastic"] = {**values["elastic"], "space": space}
    return filled, tuple(problems), unknown


def nested_parent(
    config: ElasticConfig | CostConfig, world: World | None = None, say: Callable[[str], object] = lambda text: None
) -> tuple[Path | None, Space]:
    """Return the permuted parent's checkpoint (None: none is given) and the space over its depth ranking.

    Verified as the config says where a `world` will read the weights, else by sizes. Raises CheckpointError and, for a
    parent of other sizes than section `model`, RecordError.
    """
    if config.init_from.permuted_parent is None:
        return None, config.space()
    full = world is not None and config.init_from.verify == "full"
    checkpoint = resolve_checkpoint(config.init_from.permuted_parent, full=full, world=world, say=say)
    record = Record.read(checkpoint)
    check_same_shape(config.model.shape(), record.shape, checkpoint)
    return checkpoint, config.space(record.depth_ranking)


def depth_ranking_of(config: object) -> tuple[int, ...]:
    """Return the ranking of a run's permuted parent; empty where none is given or it cannot be read."""
    record = _record(config.init_from.permuted_parent) if isinstance(config, ElasticConfig | CostConfig) else None
    return () if record is None else record.depth_ranking


def model_values(shape: ModelShape) -> dict[str, Any]:
    """Return section `model` of a parent; raises ShapeError where layers of one kind differ in width."""
    values = {name: getattr(shape, name) for name in ModelConfig.__dataclass_fields__ if hasattr(shape, name)}
    for kind, axis in INNER_AXIS.items():
        name = AXES[axis].size
        if len(set(values[name])) > 1:
            raise ShapeError(f"{kind.name} layers differ in {name}, {sorted(set(values[name]))}: it is a submodel")
        # A kind without layers has no width; one that fits its groups satisfies every rule.
        spare = {LayerKind.MAMBA: shape.mamba_groups, LayerKind.ATTENTION: shape.kv_heads, LayerKind.MLP: DEFAULT_LANES}
        values[name] = values[name][0] if values[name] else spare[kind]
    return values | {"pattern": str(shape.pattern)}


def model_problems(model: ModelConfig, record: Record, path: str) -> Iterator[Problem]:
    """Yield a problem for every size in which section `model` differs from the checkpoint `path`."""
    try:
        known = model_values(record.shape)
    except ShapeError as error:
        remedy = "give a parent whose layers of one kind share a width"
        yield Problem("init_from.permuted_parent", path, str(error), remedy)
        return
    for name, there in known.items():
        here = getattr(model, name)
        of_no_layer = getattr(record.shape, name) == ()
        same = str(here).replace("|", "") == there if name == "pattern" else here in (there, None)
        if not same and not of_no_layer:
            remedy = f"nearest legal value is {there}; section model may be left out"
            yield Problem(f"model.{name}", here, f"the checkpoint holds {name} = {there}", remedy)


def choices_by_share(
    axis: Axis, shares: Sequence[float], space: Space, parallel: ParallelConfig, heads: Sequence[int] = ()
) -> list[int]:
    """Return the widths of `space`'s parent nearest to `shares` of its own on `axis`, descending, the full one first.

    They are what the nested layout allows (multiples of lanes, groups and KV heads; whole shares of context-parallel
    ranks), and of those within ROOM the ones that kernels serve best. Layers of a depth are just counted. `heads`:
    Mamba heads that channels will be combined with.
    """
    full, multiple = space.full_width(axis), space.parts(axis)
    if axis is Axis.MAMBA_HEAD and parallel.context > 1:
        multiple = math.lcm(multiple, parallel.tensor * parallel.context)
    legal = [width for width in range(multiple, full + 1, multiple)] or [full]
    if axis is Axis.DEPTH:
        return sorted({full, *(max(1, round(share * full)) for share in shares)}, reverse=True)
    found = {full}
    for share in shares:
        nearest = min(abs(width - share * full) for width in legal)
        near = [width for width in legal if abs(width - share * full) <= max(ROOM * full, nearest)]
        found.add(min(near, key=lambda width: (*_dislike(axis, width, space, parallel.tensor, heads),
                                               abs(width - share * full))))  # fmt: skip
    return sorted(found, reverse=True)


def _dislike(axis: Axis, width: int, space: Space, ranks: int, heads: Sequence[int]) -> tuple[int, int]:
    """Return what kernels refuse or serve badly at a width, counted on one rank and on `ranks`, then its odd part."""
    count = 0
    for widths in [{axis: width, Axis.MAMBA_HEAD: n} for n in heads] if axis is Axis.MAMBA_CHANNEL else [{axis: width}]:
        cut = {a: AxisChoices(tuple(sorted({space.full_width(a), n}, reverse=True))) for a, n in widths.items()}
        shape = replace(space, axes=cut).subnet({a: (-1,) for a in cut}).shape(space.parent)
        count += sum(len(export_warnings(shape, size)) for size in {1, ranks})
    return count, TILE // math.gcd(width, TILE)


def _made_choices(
    axes: Sequence[Axis], section: Mapping[str, Any], lanes: Any, values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the axes with choices in place of shares; none where the sizes they are shares of have a problem."""
    model, wrong = load_with_problems(ModelConfig, values["model"])
    parallel, also_wrong = load_with_problems(ParallelConfig, values.get("parallel") or {})
    problems = [
        Problem(f"elastic.space.{axis}.shares", section[axis]["shares"], "must be numbers above 0 and at most 1",
                "write [1.0, 0.75, 0.5]")
        for axis in axes if not _are_shares(section[axis]["shares"])
    ]  # fmt: skip
    if wrong or also_wrong or problems:
        return {}, problems
    try:
        space = Space(model.shape(model.vocab_multiple), {}, lanes)
    except ValueError:  # the rules of the config say what is wrong with the sizes
        return {}, []
    made: dict[str, Any] = {}
    heads = (section.get(Axis.MAMBA_HEAD) or {}).get("choices") or space.parent.mamba_heads[:1]
    for axis in sorted(axes, key=list(Axis).index):  # channels come after the heads that they multiply
        if space.full_width(axis) and (heads or axis is not Axis.MAMBA_CHANNEL):  # else no layer has it
            choices = choices_by_share(axis, section[axis]["shares"], space, parallel, heads)
            made[axis.value] = {**section[axis], "choices": choices}
            del made[axis.value]["shares"]
            heads = choices if axis is Axis.MAMBA_HEAD else heads
    return made, []


def _are_shares(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1 for share in value
    )


def _section(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        inner = values.get(name)
        values = inner if isinstance(inner, Mapping) else {}
    return values


def _record(path: object) -> Record | None:
    if not isinstance(path, str) or path in OPEN or not Path(path).exists():
        return None
    try:
        return Record.read(resolve_checkpoint(path))
    except (CheckpointError, RecordError):
        return None
