"""Turn a plain nested dict into config dataclasses, collecting every problem before raising one error."""

import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from dataclasses import Field as DataclassField
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Literal, Union

from elastic.space.ranges import FolderName, Range, Required

NOT_GIVEN = "???"


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the dotted field, what it holds, the rule it breaks, and what would be legal."""

    field: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field} = {show(self.value)}: {self.rule}; {self.remedy}"

    @property
    def section(self) -> str:
        """Return the top-level key the field stands under."""
        return self.field.partition(".")[0]


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, in one error."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  {problem}" for problem in self.problems)]))


def show(value: object) -> str:
    """Write a value the way a YAML file would, at most 60 characters; of a path, its end too."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # no JSON, or a list that holds itself
        text = str(value)
    end = text[-37:] if isinstance(value, str) and "/" in value else ""
    return text if len(text) <= 60 else f"{text[: 57 - len(end)]}...{end}"


def config_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain dicts, lists and scalars, ready for YAML or JSON; `load` reads it back."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def load[T](kind: type[T], values: Mapping[str, Any]) -> T:
    """Build `kind` from `values`; raises ConfigError listing everything wrong with them."""
    config, problems = load_with_problems(kind, values)
    if problems:
        raise ConfigError(problems)
    return config


def load_with_problems[T](kind: type[T], values: Mapping[str, Any]) -> tuple[T, tuple[Problem, ...]]:
    """Build `kind`, putting the default in place of each bad value, and return the problems beside it."""
    loader = _Loader(kind)
    config = loader.dataclass_value(kind, values, "")
    return config, tuple(loader.problems)


def field_paths(kind: type, prefix: str = "") -> Iterator[str]:
    """List the dotted path of every field of a config dataclass, sections included; list entries carry no index."""
    for name, hint in _hints(kind).items():
        yield prefix + name
        for inner in _dataclasses_in(hint):
            yield from field_paths(inner, f"{prefix}{name}.")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for argument in typing.get_args(hint):
        yield from _dataclasses_in(argument)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, StrEnum) else value


class _IllegalValueError(Exception):
    """Carries one problem from a nested value to the field that holds it."""

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        super().__init__(field, rule)
        self.problem = Problem(field, value, rule, remedy)


class _Loader:
    """Walks dataclasses and values together, keeping the problems it meets."""

    def __init__(self, kind: type) -> None:
        self.problems: list[Problem] = []
        self.kind = kind

    def dataclass_value(self, kind: type, values: Any, path: str) -> Any:
        """Build one dataclass; a field with a problem keeps its default, or an empty text if it has none."""
        if not isinstance(values, Mapping):
            self.problems.append(Problem(path, values, "must be a section", f"with keys {', '.join(_names(kind))}"))
            values = {}
        prefix = f"{path}." if path else ""
        for key in values:
            if key not in _names(kind):
                self.problems.append(self._unknown(prefix, str(key), values[key], _names(kind)))
        hints = _hints(kind)
        built = {}
        for field in fields(kind):
            field_path, hint = prefix + field.name, hints[field.name]
            given = values.get(field.name, NOT_GIVEN)
            try:
                built[field.name] = self._field(field, hint, given, field_path)
            except _IllegalValueError as error:
                self.problems.append(error.problem)
                built[field.name] = _fallback(field)
        return kind(**built)

    def _field(self, field: DataclassField[Any], hint: Any, given: Any, path: str) -> Any:
        requirement = next((extra for extra in _extras(hint) if isinstance(extra, Required)), None)
        if given == NOT_GIVEN and not is_dataclass(hint):
            given = _plain_default(field)
        if requirement is not None and given in (NOT_GIVEN, "", None, []):
            raise _IllegalValueError(path, None, "missing, it has no default", f"set {path}=..., {requirement.hint}")
        return self._value(hint, {} if given == NOT_GIVEN else given, path, _remedy(field))

    def _value(self, hint: Any, given: Any, path: str, remedy: str) -> Any:
        """Convert `given` to what the annotation `hint` says; raises _IllegalValueError."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            value = self._value(arguments[0], given, path, remedy)
            for limits in (extra for extra in arguments[1:] if isinstance(extra, Range)):
                _check_range(limits, given if isinstance(value, tuple) else value, path, remedy)
            for name in (extra for extra in arguments[1:] if isinstance(extra, FolderName)):
                _check_folder_name(name, value, path)
            return value
        if origin in (Union, types.UnionType):
            inner = next(argument for argument in arguments if argument is not type(None))
            return None if given is None else self._value(inner, given, path, remedy)
        if origin is Literal:
            return _one_of(arguments, given, path)
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            return hint(_one_of(tuple(member.value for member in hint), given, path))
        if origin is tuple:
            return self._list(arguments, given, path, remedy)
        if origin is list:
            return list(self._list((arguments[0], ...), given, path, remedy))
        if origin is Mapping:
            return self._mapping(arguments, given, path, remedy)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.dataclass_value(hint, given, path)
        return _scalar(hint, given, path, remedy)

    def _list(self, arguments: tuple[Any, ...], given: Any, path: str, remedy: str) -> tuple[Any, ...]:
        if not isinstance(given, list | tuple):
            raise _IllegalValueError(path, given, "must be a list", f"write [{show(given)}] for one entry")
        if arguments[-1] is Ellipsis:
            hints = [arguments[0]] * len(given)
        elif len(given) == len(arguments):
            hints = list(arguments)
        else:
            raise _IllegalValueError(path, given, f"must have {len(arguments)} entries", remedy)
        paths = [f"{path}.{index}" for index in range(len(given))]
        return tuple(self._legal_entries(zip(hints, given, paths, strict=True), remedy).values())

    def _mapping(self, hints: tuple[Any, Any], given: Any, path: str, remedy: str) -> Mapping[Any, Any]:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise _IllegalValueError(path, given, "must map names to values", remedy)
        names = {f"{path}.{key}": self._value(hints[0], str(key), f"{path}.{key}", remedy) for key in given}
        legal = self._legal_entries(((hints[1], entry, f"{path}.{key}") for key, entry in given.items()), remedy)
        return {names[entry_path]: entry for entry_path, entry in legal.items()}

    def _legal_entries(self, entries: Iterable[tuple[Any, Any, str]], remedy: str) -> dict[str, Any]:
        """Convert (annotation, given, path) entries, leave the illegal ones out and keep a problem for each of them."""
        legal = {}
        for hint, given, path in entries:
            try:
                legal[path] = self._value(hint, given, path, remedy)
            except _IllegalValueError as error:
                self.problems.append(error.problem)
        return legal

    def _unknown(self, prefix: str, key: str, value: Any, names: tuple[str, ...]) -> Problem:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
        elsewhere = [path for path in field_paths(self.kind) if path.rpartition(".")[2] == key]
        if near:
            remedy = f"did you mean {prefix}{near[0]}?"
        elif elsewhere:
            remedy = f"did you mean {elsewhere[0]}?"
        else:
            remedy = f"known here: {', '.join(names)}"
        return Problem(prefix + key, value, "unknown key", remedy)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _extras(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _plain_default(field: DataclassField[Any]) -> Any:
    """Return a field's default as plain values, so that defaults pass the same checks; NOT_GIVEN if it has none."""
    default = _default(field)
    if default is MISSING:
        return NOT_GIVEN
    if isinstance(default, tuple):
        return [config_dict(entry) if is_dataclass(entry) else entry for entry in default]
    return default


def _default(field: DataclassField[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _fallback(field: DataclassField[Any]) -> Any:
    default = _default(field)
    return "" if default is MISSING else default


def _remedy(field: DataclassField[Any]) -> str:
    default = _plain_default(field)
    return "it has no default" if default in (NOT_GIVEN, "", [], {}) else f"the default is {show(default)}"


def _check_folder_name(name: FolderName, value: str, path: str) -> None:
    if re.fullmatch(name.pattern, value) is None:
        nearest = re.sub(r"^\W+|[^\w.+-]", "", value)[:100] or "member"
        raise _IllegalValueError(path, value, name.rule, f"nearest legal value is {nearest}")


def _check_range(limits: Range, value: Any, path: str, remedy: str) -> None:
    is_list = isinstance(value, list | tuple)
    size, low, high = len(value) if is_list else value, limits.low, limits.high
    if low is not None and (size <= low if limits.open_low else size < low):
        least = f"must be {'above' if limits.open_low else 'at least'} {_plain_number(low)}"
        nearest = remedy if is_list or limits.open_low else f"nearest legal value is {_plain_number(low)}"
        raise _IllegalValueError(path, value, "must not be empty" if is_list else least, nearest)
    if high is not None and (size >= high if limits.open_high else size > high):
        rule = f"must be {'below' if limits.open_high else 'at most'} {_plain_number(high)}"
        nearest = remedy if limits.open_high else f"nearest legal value is {_plain_number(high)}"
        raise _IllegalValueError(path, value, rule, nearest)


def _plain_number(limit: float) -> str:
    return str(int(limit)) if limit == int(limit) and limit < 1e17 else f"{limit:g}"


def _one_of(legal: tuple[Any, ...], given: Any, path: str) -> Any:
    if given in legal:
        return legal[legal.index(given)]
    names = [name if isinstance(name, str) else show(name) for name in legal]
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.0)
    raise _IllegalValueError(path, given, f"must be one of {', '.join(names)}", f"nearest legal value is {near[0]}")


def _scalar(hint: Any, given: Any, path: str, remedy: str) -> Any:
    """Convert one scalar: an int also takes 65e9, a float an int, a text any number; a bool is no number."""
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    is_finite = is_number and abs(given) <= sys.float_info.max  # compares whole numbers beyond every float, too
    if is_finite and (hint is float or (hint is int and given == int(given))):
        return hint(given)
    if hint is str and is_number:
        return str(given)  # the shell takes quotes away: a name may look like a number
    if hint in (bool, str) and isinstance(given, hint):
        return given
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    if hint is int and is_finite:
        remedy = f"nearest legal value is {round(given)}"
    if hint is str and isinstance(given, bool):
        remedy = f"write it in quotes inside quotes, {path}='\"{show(given)}\"'"
    raise _IllegalValueError(path, given, f"must be {names[hint]}", remedy)
