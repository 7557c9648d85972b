"""Mistakes on the command line that Hydra would report without naming the argument, or what there is to choose from."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from elastic.config.load import ConfigError, Problem

CONFIG_NAME = ("--config-name", "-cn")
CONFIG_DIR = ("--config-dir", "-cd")
CONFIG_PATH = ("--config-path", "-cp")
WITH_VALUE = (
    *CONFIG_NAME,
    *CONFIG_DIR,
    *CONFIG_PATH,
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--experimental-rerun",
)
MULTIRUN = ("--multirun", "-m")


def own_folder(arguments: Sequence[str]) -> Path | None:
    """Return the folder of the user's own configs, which stand beside those of conf/ (`--config-dir`), or None."""
    found = [value for option, value in _options(arguments) if option in CONFIG_DIR]
    return Path(found[-1]) if found else None


def with_quotes(arguments: Sequence[str]) -> list[str]:
    """Put a constraint in quotes: Hydra takes no comparison signs, and a comma for another run."""
    pattern = re.compile(r"(\+{0,2}constraint)=([^\"'].*[<>].*)")
    return [pattern.sub(r'\1="\2"', argument) if pattern.fullmatch(argument) else argument for argument in arguments]


def check_arguments(arguments: Sequence[str], conf: Path) -> None:
    """Raise ConfigError listing every argument that cannot be used; `conf` holds whole runs and groups of files.

    Keys and values of the config are not judged here but in its dataclasses.
    """
    problems = tuple(argument_problems(arguments, conf))
    if problems:
        raise ConfigError(problems)


def argument_problems(arguments: Sequence[str], conf: Path) -> Iterator[Problem]:
    """Yield what is wrong with each argument; files are looked for in conf/ and in the folder of --config-dir."""
    given, own = list(_options(arguments)), own_folder(arguments)
    elsewhere = any(option in CONFIG_PATH or "hydra.searchpath" in option for option, _ in given)
    folders = () if elsewhere else (conf,) if own is None else (conf, own)
    is_sweep = any(option in MULTIRUN for option, _ in given)
    if own is not None and not own.is_dir():
        yield Problem("--config-dir", str(own), "is no folder", "name the folder that holds your own YAML files")
    for (option, value), argument in zip(given, arguments, strict=True):
        if option in CONFIG_NAME and value and folders:
            yield from _name_problems("--config-name", value, folders, conf.name)
        elif not option.startswith("-"):
            yield from _override_problems(argument, folders, is_sweep=is_sweep)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each argument as (option or key, value); the value of `--option value` comes with its option."""
    previous = ""
    for argument in arguments:
        word = argument.partition("=")[0]
        if previous in WITH_VALUE and not argument.startswith("-"):
            yield previous, argument
        else:
            yield word, argument.removeprefix(word).removeprefix("=")
        previous = argument


def _override_problems(argument: str, folders: Sequence[Path], *, is_sweep: bool) -> Iterator[Problem]:
    """Yield what keeps one override from being used; without `folders`, any name of a file may be legal."""
    key, has_value, value = argument.partition("=")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        remedy = f"put the value in quotes, '{key}=\"{value}\"'" if value else f"write {key}=VALUE"
        yield Problem(key, value if has_value else None, "is not KEY=VALUE as Hydra reads it", remedy)
        return
    if not override.key_or_group:
        yield Problem("command line", argument, "has no key before the =", "write KEY=VALUE")
    elif override.is_sweep_override() and not is_sweep:
        rule = "is several values, which only --multirun runs one after the other"
        yield Problem(key, value, rule, f"write {key}=[{value}] for a list")
    elif any((folder / override.key_or_group).is_dir() for folder in folders) and not override.is_delete():
        yield from _group_problems(override, folders)
    elif override.value() == {} and not override.is_delete():
        rule = "is merged with the entries that are there, and changes nothing"
        yield Problem(key, {}, rule, f"write {key}=null for none of them, or the entries that differ")


def _group_problems(override: Override, folders: Sequence[Path]) -> Iterator[Problem]:
    group, value = override.key_or_group, override.value()
    inside = [folder / group for folder in folders]
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str):
            yield from _name_problems(group, name, inside, f"{folders[0].name}/{group}")
        else:
            rule = "is a group of files and takes the name of one"
            remedy = f"there are {', '.join(_names(inside))}; a field of it is set as {group}.FIELD=VALUE"
            yield Problem(group, value, rule, remedy)


def _name_problems(field: str, name: str, folders: Sequence[Path], shown: str) -> Iterator[Problem]:
    """Yield a problem if none of `folders`, called `shown` in it, has a YAML file `name`."""
    known = _names(folders)
    if name.removesuffix(".yaml") not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        yield Problem(field, name, f"is no file of {shown}/", f"nearest is {near}, there are {', '.join(known)}")


def _names(folders: Sequence[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
