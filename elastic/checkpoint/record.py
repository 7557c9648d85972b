"""The record beside every checkpoint: what the weights are, in JSON, so that a later verb needs no config."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from elastic.config.load import load
from elastic.space.axes import Axis
from elastic.space.cost import Budget, Deployment
from elastic.space.ranges import Size
from elastic.space.shape import LayerPattern, ModelShape
from elastic.space.space import AxisChoices, KeepAtLeast, Space

RECORD_FILE = "record.json"


class RecordError(ValueError):
    """A checkpoint whose record is missing, unreadable, or of another model than asked for."""


@dataclass(frozen=True)
class Family:
    """What a router chooses from: budgets, their deployment conditions, the router's width."""

    axes: Mapping[Axis, AxisChoices]
    budgets: tuple[Budget, ...]
    deployment: Deployment
    router_width: Size
    keep_at_least: KeepAtLeast = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """Sizes and nesting of the weights in a checkpoint.

    `kind`: parent (unordered), permuted_parent (nested), elastic (nested and trained), submodel (cut out).
    `data` names the prepared folder the model was trained on, so that its tokenizer is found again.
    """

    kind: str
    shape: ModelShape
    lanes: int = 1
    depth_ranking: tuple[int, ...] = ()
    data: str | None = None
    family: Family | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def space(self) -> Space:
        """Return the space of subnets; the parent alone where no family was trained."""
        axes, keep = ({}, {}) if self.family is None else (self.family.axes, self.family.keep_at_least)
        return Space(self.shape, axes, self.lanes, self.depth_ranking, keep)

    def write(self, folder: Path) -> None:
        """Write the record into a checkpoint folder."""
        content = asdict(self) | {"shape": _sizes(self.shape)}
        (folder / RECORD_FILE).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read a checkpoint's record; raises RecordError when it is missing or not readable."""
        path = folder / RECORD_FILE
        if not path.is_file():
            raise RecordError(f"{folder} holds no {RECORD_FILE}: it is not a checkpoint of this project")
        try:
            return _from_json(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{path} is damaged or of another version: {error!r}") from error


def check_same_shape(expected: ModelShape, found: ModelShape, where: Path) -> None:
    """Raise RecordError listing every size in which a checkpoint differs from the config."""
    ours, theirs = _sizes(expected), _sizes(found)
    unlike = [name for name in ours if ours[name] != theirs[name]]
    differences = [f"{name}: config {ours[name]}, checkpoint {theirs[name]}" for name in unlike]
    if differences:
        raise RecordError(f"{where} holds another model than section `model` states. " + "; ".join(differences))


def _sizes(shape: ModelShape) -> dict[str, Any]:
    """Return the sizes of a shape by name, its pattern as text."""
    return asdict(shape) | {"pattern": str(shape.pattern)}


def _with_tolerances(family: dict[str, Any]) -> dict[str, Any]:
    """Fill in what records of before did not state: choices within 2% of a budget were kept, so weights have them."""
    return family | {"budgets": [{"tolerance": 0.02} | budget for budget in family["budgets"]]}


def _from_json(content: dict[str, Any]) -> Record:
    given = {entry.name: content[entry.name] for entry in fields(Record)}
    sizes: dict[str, Any] = given["shape"]
    sizes = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
    shape = ModelShape(**sizes | {"pattern": LayerPattern.parse(sizes["pattern"])})
    family = None if given["family"] is None else load(Family, _with_tolerances(given["family"]))
    return Record(**{**given, "shape": shape, "depth_ranking": tuple(given["depth_ranking"]), "family": family})
