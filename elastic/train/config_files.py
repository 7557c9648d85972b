"""Configs and the file system: inputs that must exist, and a run folder that must be free."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from elastic.train.config import (
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    ImportanceConfig,
    ImportConfig,
    ModelRunConfig,
    RunConfig,
    TrainConfig,
    with_vocab,
)
from elastic.train.config_load import ConfigError, Problem, load_with_problems
from elastic.train.config_rules import rule_problems
from elastic.train.config_rules_layout import Cluster
from elastic.train.manifest import DataError, read_manifest
from elastic.train.prepare_config import PrepareConfig


def load_run[T](kind: type[T], values: Mapping[str, Any], cluster: Cluster, *, is_main: bool) -> T:
    """Build and check a verb's config, files included, and fill a null model.vocab in from the prepared data.

    Only the main process looks whether the run folder is free: it is also the one that will create it.
    Raises ConfigError listing every problem.
    """
    config, problems = load_with_problems(kind, values)
    unreliable = frozenset(problem.section for problem in problems)
    files = tuple(problem for problem in input_problems(config) if problem.section not in unreliable)
    if not unreliable.intersection(("model", "data")) and not files:
        try:
            config = filled_in(config)
        except DataError as error:
            files += (Problem("model.vocab", None, str(error), "or set model.vocab"),)
    problems += rule_problems(config, cluster, unreliable) + files
    if is_main and isinstance(config, RunConfig) and "exp_manager" not in unreliable:
        problems += tuple(output_problems(config))
    if isinstance(config, PrepareConfig) and not unreliable:
        problems += tuple(preparation_problem(text) for text in config.problems())
    if problems:
        raise ConfigError(problems)
    return config


def filled_in(config: Any) -> Any:
    """Return the config with a null model.vocab taken from the prepared data; raises DataError."""
    if not isinstance(config, ModelRunConfig) or config.model.vocab is not None:
        return config
    return with_vocab(config, read_manifest(Path(config.data.path)).tokenizer.vocab_size)


def input_paths(config: object) -> Iterator[tuple[str, str | None]]:
    """List (field, path) of every file or folder a verb reads; a path may be null."""
    if isinstance(config, ModelRunConfig | EvaluateConfig | ExtractConfig):
        yield "data.path", config.data.path
    if isinstance(config, ImportConfig):
        yield "source", config.source
    if isinstance(config, ImportanceConfig | ElasticConfig | EvaluateConfig | ExtractConfig):
        for field in fields(config.init_from):
            yield f"init_from.{field.name}", getattr(config.init_from, field.name)


def input_problems(config: object) -> Iterator[Problem]:
    """Yield a problem for every input that is not there."""
    for name, path in input_paths(config):
        if path is not None and not Path(path).exists():
            parent = next((folder for folder in Path(path).parents if folder.exists()), Path())
            yield Problem(name, path, "does not exist", f"the nearest folder that exists is {parent}")


def output_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if the run folder holds something that the config neither continues nor replaces."""
    manager = config.exp_manager
    folder = Path(manager.run_dir)
    resumes = isinstance(config, TrainConfig) and config.exp_manager.resume_if_exists
    if manager.overwrite or resumes or not folder.exists() or not any(folder.iterdir()):
        return
    ways = ["exp_manager.overwrite=true"]
    if isinstance(config, TrainConfig):
        ways.append("exp_manager.resume_if_exists=true")
    remedy = f"nearest free name is {free_version(folder)}, or set {' or '.join(ways)}"
    yield Problem("exp_manager.version", manager.version, f"the folder {folder} is not empty", remedy)


def free_version(folder: Path) -> str:
    """Return the first of version_0, version_1, ... that does not exist beside `folder`."""
    number = 0
    while (folder.parent / f"version_{number}").exists():
        number += 1
    return f"version_{number}"


def preparation_problem(text: str) -> Problem:
    """Turn a line `field = value: rule; remedy` of PrepareConfig.problems into a Problem."""
    name, _, rest = text.partition(" = ")
    value, _, rest = rest.partition(": ")
    rule, _, remedy = rest.partition("; ")
    return Problem(name, value, rule, remedy)
