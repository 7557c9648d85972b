"""Turn a plain nested dict into config dataclasses, collecting every problem before raising one error."""

import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache, partial
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


Problems = Iterator[Problem]


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
    return dict(_plain(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted path; lists of sections are numbered, other lists are leaves."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = {str(index): entry for index, entry in enumerate(value)}
        leaves |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def load[T](kind: type[T], values: Mapping[str, Any]) -> T:
    """Build `kind` from `values`; raises ConfigError listing everything wrong with them."""
    config, problems = load_with_problems(kind, values)
    if problems:
        raise ConfigError(problems)
    return config


def load_with_problems[T](kind: type[T], values: Mapping[str, Any]) -> tuple[T, tuple[Problem, ...]]:
    """Build `kind`, putting the default in place of each bad value, and return the problems beside it."""
    loader = _Loader(kind)
    return loader.section(kind, values, ""), tuple(loader.problems)


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
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, StrEnum) else value


class _Loader:
    """Walks dataclasses and values together, keeping the problems it meets.

    A value that cannot be converted raises ConfigError, kept by `_legal` for the list, mapping or section around it.
    """

    def __init__(self, kind: type) -> None:
        self.problems: list[Problem] = []
        self.kind = kind

    def section(self, kind: type, values: Any, path: str) -> Any:
        """Build one dataclass; a field with a problem keeps its default, or an empty text if it has none."""
        hints, prefix = _hints(kind), f"{path}." if path else ""
        if not isinstance(values, Mapping):
            self.problems.append(Problem(path, values, "must be a section", f"with keys {', '.join(hints)}"))
            values = {}
        self.problems += [self._unknown(prefix, str(key), values[key], hints) for key in values if key not in hints]
        built = self._legal(
            (field.name, partial(self._field, field, hints[field.name], values.get(field.name, NOT_GIVEN), prefix))
            for field in fields(kind)
        )
        empty = {field.name: "" for field in fields(kind) if _default(field) == NOT_GIVEN}
        return kind(**empty | built)

    def _field(self, field: Field[Any], hint: Any, given: Any, prefix: str) -> Any:
        path, default = prefix + field.name, {} if is_dataclass(hint) else _default(field)
        given = default if given == NOT_GIVEN else given
        requirement = next((extra for extra in typing.get_args(hint) if isinstance(extra, Required)), None)
        if requirement is not None and given in (NOT_GIVEN, "", None, []):
            raise _illegal(path, None, "missing, it has no default", f"set {path}=..., {requirement.hint}")
        has_default = default not in (NOT_GIVEN, "", [], {})
        needed = "it has no default" if requirement is None else requirement.hint
        remedy = f"the default is {show(default)}" if has_default else needed
        return self._value(hint, {} if given == NOT_GIVEN else given, path, remedy)

    def _value(self, hint: Any, given: Any, path: str, remedy: str) -> Any:
        """Convert `given` to what the annotation `hint` says; raises ConfigError."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return given
        if origin is Annotated:
            value = self._value(arguments[0], given, path, remedy)
            for extra in arguments[1:]:
                if isinstance(extra, Range):
                    entries = [given] if isinstance(given, str) else given
                    _check_range(extra, entries if isinstance(value, tuple) else value, path, remedy)
                elif isinstance(extra, FolderName) and re.fullmatch(extra.pattern, value) is None:
                    nearest = re.sub(r"^\W+|[^\w.+-]", "", value)[:100] or "member"
                    raise _illegal(path, value, extra.rule, f"nearest legal value is {nearest}")
            return value
        if origin in (Union, types.UnionType):
            return None if given is None else self._value(arguments[0], given, path, remedy)  # None stands last
        if origin is Literal:
            return _one_of(arguments, given, path)
        if origin in (tuple, list):
            if isinstance(given, str) and typing.get_origin(arguments[0]) is Literal:
                given = [given]  # one of a few known words needs no brackets
            return origin(self._list(arguments if origin is tuple else (*arguments, ...), given, path, remedy))
        if origin is Mapping:
            return self._mapping(arguments, given, path, remedy)
        if issubclass(hint, StrEnum):
            return hint(_one_of(tuple(member.value for member in hint), given, path))
        if is_dataclass(hint) and isinstance(hint, type):
            return self.section(hint, given, path)
        return _scalar(hint, given, path, remedy)

    def _list(self, arguments: tuple[Any, ...], given: Any, path: str, remedy: str) -> Iterable[Any]:
        if not isinstance(given, list | tuple):
            raise _illegal(path, given, "must be a list", f"write [{show(given)}] for one entry")
        if hasattr(arguments[0], "spelled_out"):  # a section that has a shorter way to write a list of it
            given = arguments[0].spelled_out(given)
        hints = arguments[:1] * len(given) if arguments[-1] is Ellipsis else arguments
        if len(given) != len(hints):
            raise _illegal(path, given, f"must have {len(hints)} entries", remedy)
        pairs = enumerate(zip(hints, given, strict=True))
        entries = ((index, partial(self._value, *pair, f"{path}.{index}", remedy)) for index, pair in pairs)
        return self._legal(entries).values()

    def _mapping(self, hints: tuple[Any, Any], given: Any, path: str, remedy: str) -> Mapping[Any, Any]:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise _illegal(path, given, "must map names to values", remedy)
        names = [self._value(hints[0], str(key), f"{path}.{key}", remedy) for key in given]
        entries = (partial(self._value, hints[1], entry, f"{path}.{key}", remedy) for key, entry in given.items())
        return self._legal(zip(names, entries, strict=True))

    def _legal[K](self, entries: Iterable[tuple[K, Callable[[], Any]]]) -> dict[K, Any]:
        """Convert (name, conversion) entries, leave the illegal ones out and keep a problem for each of them."""
        legal = {}
        for name, converted in entries:
            try:
                legal[name] = converted()
            except ConfigError as error:
                self.problems += error.problems
        return legal

    def _unknown(self, prefix: str, key: str, value: Any, names: Iterable[str]) -> Problem:
        near = [prefix + name for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)]
        near += [path for path in field_paths(self.kind) if path.rpartition(".")[2] == key]
        remedy = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
        return Problem(prefix + key, value, "unknown key", remedy)


def _illegal(path: str, value: object, rule: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(path, value, rule, remedy)])


def _default(field: Field[Any]) -> Any:
    """Return a field's default as plain values, so that defaults pass the same checks; NOT_GIVEN if it has none."""
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return NOT_GIVEN if default is MISSING else _plain(default)


def _check_range(limits: Range, value: Any, path: str, remedy: str) -> None:
    is_list = isinstance(value, list | tuple)
    size, low, high = len(value) if is_list else value, limits.low, limits.high
    if low is not None and (size <= low if limits.open_low else size < low):
        least = f"must be {'above' if limits.open_low else 'at least'} {plain_number(low)}"
        nearest = remedy if is_list or limits.open_low else f"nearest legal value is {plain_number(low)}"
        raise _illegal(path, value, "must not be empty" if is_list else least, nearest)
    if high is not None and (size >= high if limits.open_high else size > high):
        rule = f"must be {'below' if limits.open_high else 'at most'} {plain_number(high)}"
        nearest = remedy if limits.open_high else f"nearest legal value is {plain_number(high)}"
        raise _illegal(path, value, rule, nearest)


def plain_number(limit: float) -> str:
    """Write a number without a fraction that is zero."""
    return str(int(limit)) if limit == int(limit) and limit < 1e17 else f"{limit:g}"


def _one_of(legal: tuple[Any, ...], given: Any, path: str) -> Any:
    if given in legal:
        return legal[legal.index(given)]
    names = [name if isinstance(name, str) else show(name) for name in legal]
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.0)
    raise _illegal(path, given, f"must be one of {', '.join(names)}", f"nearest legal value is {near[0]}")


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
    raise _illegal(path, given, f"must be {names[hint]}", remedy)
