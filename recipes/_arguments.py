"""Mistakes on the command line that Hydra would report without naming the argument, or what there is to choose from."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from elastic.config.load import ConfigError, Problem

CONFIG_NAME = ("--config-name", "-cn")
OTHER_FOLDERS = ("--config-path", "-cp", "--config-dir", "-cd")
WITH_VALUE = (*CONFIG_NAME, *OTHER_FOLDERS, "--package", "-p", "--cfg", "-c", "--info", "-i", "--experimental-rerun")
MULTIRUN = ("--multirun", "-m")


def check_arguments(arguments: Sequence[str], conf: Path) -> None:
    """Raise ConfigError listing every argument that cannot be used; `conf` holds whole runs and groups of files.

    Keys and values of the config are not judged here but in its dataclasses.
    """
    problems = tuple(argument_problems(arguments, conf))
    if problems:
        raise ConfigError(problems)


def argument_problems(arguments: Sequence[str], conf: Path) -> Iterator[Problem]:
    """Yield what is wrong with each argument; files are only looked for where the user names no folder of their own."""
    words = [argument.partition("=")[0] for argument in arguments]
    own_files = any(word in OTHER_FOLDERS or "hydra.searchpath" in word for word in words)
    is_sweep = any(word in MULTIRUN for word in words)
    previous = ""
    for argument, word in zip(arguments, words, strict=True):
        if previous in WITH_VALUE and not argument.startswith("-"):
            option, value = previous, argument
        else:
            option, value = word, argument.removeprefix(word).removeprefix("=")
        previous = argument
        if option in CONFIG_NAME and value and not own_files:
            yield from _name_problems("--config-name", value, conf, conf.name)
        elif not option.startswith("-"):
            yield from _override_problems(argument, None if own_files else conf, is_sweep=is_sweep)


def _override_problems(argument: str, conf: Path | None, *, is_sweep: bool) -> Iterator[Problem]:
    """Yield what keeps one override from being used; without `conf`, any name of a file may be legal."""
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
    elif conf is not None and (conf / override.key_or_group).is_dir() and not override.is_delete():
        yield from _group_problems(override, conf)


def _group_problems(override: Override, conf: Path) -> Iterator[Problem]:
    group, value = override.key_or_group, override.value()
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str):
            yield from _name_problems(group, name, conf / group, f"{conf.name}/{group}")
        else:
            rule = "is a group of files and takes the name of one"
            remedy = f"there are {', '.join(_names(conf / group))}; a field of it is set as {group}.FIELD=VALUE"
            yield Problem(group, value, rule, remedy)


def _name_problems(field: str, name: str, folder: Path, shown: str) -> Iterator[Problem]:
    """Yield a problem if `folder`, called `shown` in it, has no YAML file `name`."""
    if not (folder / f"{name.removesuffix('.yaml')}.yaml").is_file():
        known = _names(folder)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        yield Problem(field, name, f"is no file of {shown}/", f"nearest is {near}, there are {', '.join(known)}")


def _names(folder: Path) -> list[str]:
    return [path.stem for path in sorted(folder.glob("*.yaml"))]
