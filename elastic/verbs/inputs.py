"""Configs and the file system: inputs that must exist, and a run folder that must be free."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from elastic.blend.foreign import foreign_prefixes, tokenizer_record
from elastic.blend.sources import blend_problems, tokenizer_folder
from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.config.export import ExportConfig
from elastic.config.latency import with_table
from elastic.config.load import ConfigError, Problem, load_with_problems
from elastic.config.rules import rule_problems
from elastic.config.rules_layout import Cluster, layout_problems, nearest_divisor
from elastic.config.tasks import EvaluateTasksConfig
from elastic.config.verbs import (
    CostConfig,
    ElasticConfig,
    ElasticRunConfig,
    EvaluateConfig,
    ExtractConfig,
    GenerateConfig,
    HeldOutConfig,
    ImportanceConfig,
    ImportanceSection,
    ImportConfig,
    SearchConfig,
    TrainConfig,
    VerbConfig,
    with_vocab,
)
from elastic.corpus.config import PrepareConfig
from elastic.data.manifest import DataError
from elastic.engines.check import missing_environment, unfit
from elastic.run.folder import is_left_over, is_of_a_run
from elastic.space.gates import Execution
from elastic.space.shape import ModelShape
from elastic.verbs.evaluate_tasks import tasks_problems
from elastic.verbs.fp8_loss import fp8_reader_problems
from elastic.verbs.generate import generate_problems
from elastic.verbs.going_on import start_problems
from elastic.verbs.members import members_problems, source_problems, sources
from elastic.verbs.parent import depth_ranking_of, fill_from_parent, model_problems
from elastic.verbs.report_file import output_file_problems
from elastic.verbs.search import search_problems
from elastic.verbs.subnet_file import fill_subnets
from elastic.verbs.text import length_problems, tokenizer_problems, vocab_problems
from elastic.world.files import nearest_existing

SERVED = (GenerateConfig, EvaluateTasksConfig)
FROM_CHECKPOINTS = (ImportanceConfig, ElasticConfig, CostConfig, HeldOutConfig, ExtractConfig, *SERVED)


def load_run[T](kind: type[T], values: Mapping[str, Any], cluster: Cluster, *, is_main: bool) -> T:
    """Build and check a verb's config, files included; what it leaves to its parent or its data is filled in.

    Only the main process looks whether the run folder is free: it is also the one that will create it.
    Raises ConfigError listing every problem.
    """
    named = dict(_named_files(values))
    values, no_table = with_table(kind, values)
    values, no_subnets = fill_subnets(kind, values)
    values, open_problems, unknown = fill_from_parent(kind, values)
    config, problems = load_with_problems(kind, values)
    unreliable = frozenset(problem.section for problem in (*problems, *no_table))
    unclear = unreliable | unknown
    files = tuple(problem for problem in input_problems(config) if problem.section not in unreliable)
    if not files and "data" not in unreliable and reads_data(config):
        files = tuple(blend_problems(config.data))
    problems += (*open_problems, *no_table, *no_subnets)
    if not unclear.intersection(("model", "data")) and not files:
        try:
            config = filled_in(config)
        except DataError as error:
            files += (Problem("model.vocab", None, str(error), "or set model.vocab"),)
    problems += rule_problems(config, cluster, unclear, depth_ranking_of(config)) + files
    if not unclear.intersection(("model", "data")) and not files:
        problems += tuple(vocab_problems(config))
    if not unreliable and not files:
        problems += (*length_problems(config), *checkpoint_problems(config))
    if is_main and not unreliable.intersection(("exp_manager", "output")):
        problems += tuple(output_problems(config, named))
    if isinstance(config, PrepareConfig):
        problems += tuple(config.rule_problems(unreliable))
    if problems:
        raise ConfigError(problems)
    return config


def filled_in(config: Any) -> Any:
    """Return the config with a null model.vocab taken from the prepared data; raises DataError."""
    if not isinstance(config, TrainConfig) or config.model.vocab is not None:
        return config
    if not config.data.path and not config.data.blend:
        if not isinstance(config, CostConfig):
            return config  # a rule says that data are missing
        raise DataError("the vocabulary is that of the data, and no data.path is given")
    return with_vocab(config, tokenizer_record(tokenizer_folder(config.data)).vocab_size)


def reads_data(config: object) -> TypeGuard[TrainConfig | ImportanceConfig | HeldOutConfig]:
    """Tell whether a verb opens the data it names; pricing only does so for the vocabulary."""
    priced = isinstance(config, CostConfig) and config.model.vocab is not None
    return isinstance(config, TrainConfig | ImportanceConfig | HeldOutConfig) and not priced


def input_paths(config: object) -> Iterator[tuple[str, str | None]]:
    """List (field, path) of every file or folder a verb reads; a path may be null."""
    if isinstance(config, ExtractConfig) or reads_data(config):
        yield "data.path", config.data.path or None
    if reads_data(config):
        yield "data.tokenizer", config.data.tokenizer
        for index, source in enumerate(config.data.blend):
            for name in ("path", "tokenizer", "validation"):
                yield f"data.blend.{index}.{name}", getattr(source, name)
    if isinstance(config, ImportConfig):
        yield "source", config.source
    if isinstance(config, GenerateConfig):
        yield from ((name, getattr(config, name)) for name in ("folder", "tokenizer", "prompt_file", "chat_file"))
    if isinstance(config, EvaluateTasksConfig):
        yield from ((name, getattr(config, name)) for name in ("folder", "tokenizer", "include_path"))
    if isinstance(config, FROM_CHECKPOINTS):
        yield from sources(config.init_from)


def input_problems(config: object) -> Iterator[Problem]:
    """Yield a problem for every input, and every engine's environment, that is not there."""
    if isinstance(config, ExtractConfig):
        for name in config.export.engines:
            if config.export.written_for(name) and (place := missing_environment(name)) is not None:
                rule = f"{name} has no environment in {place}"
                yield Problem("export.check", list(config.export.check), rule, f"make it with `make engine-{name}`")
    for name, path in input_paths(config):
        if path is not None and not Path(path).exists() and not foreign_prefixes(Path(path)):
            remedy = f"the nearest folder that exists is {nearest_existing(Path(path))}"
            if name == "source" and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.exists():
                remedy = f"a model of the hub comes first: hf download {path} --local-dir {Path(path).name}"
            yield Problem(name, path, "does not exist", remedy)


def checkpoint_problems(config: object) -> Iterator[Problem]:
    """Yield a problem for a checkpoint that cannot be opened, or does not have or allow what is asked of it."""
    if not isinstance(config, FROM_CHECKPOINTS):
        return
    if broken := tuple(source_problems(config.init_from)):
        yield from broken
    elif isinstance(config, GenerateConfig):
        yield from generate_problems(config)
    elif isinstance(config, EvaluateTasksConfig):
        yield from tasks_problems(config)
    elif found := sources(config.init_from):
        name, path = found[0]
        checkpoint = resolve_checkpoint(path)
        record = Record.read(checkpoint)
        if isinstance(config, ExtractConfig) or not config.data.blend:
            yield from tokenizer_problems("data.path", config.data.path or None, checkpoint, record)
        else:
            yield from tokenizer_problems("data.blend", str(tokenizer_folder(config.data)), checkpoint, record)
        match config:
            case ImportanceConfig():
                yield from _lane_problems(record.shape, config.lanes)
                yield from _removal_problems(config.importance, len(record.shape.pattern))
                yield from layout_problems(record.shape, config.parallel, config.lanes)
            case ElasticConfig() | CostConfig():
                yield from _nesting_problems(config, record, name, path)
                yield from start_problems(config, record)
            case HeldOutConfig() | ExtractConfig():
                masked = isinstance(config, EvaluateConfig) and config.execution is Execution.MASK
                broken = tuple(members_problems(config.init_from, config.budget_names, config.subnets, masked=masked))
                yield from broken
                if isinstance(config, ExtractConfig):
                    yield from _check_problems(config.export, record.shape)
                if isinstance(config, HeldOutConfig):
                    lanes = record.lanes if record.lanes > 1 else None
                    yield from layout_problems(record.shape, config.parallel, lanes)
                if isinstance(config, SearchConfig) and not broken:
                    yield from search_problems(config)


def _check_problems(export: ExportConfig, parent: ModelShape) -> Iterator[Problem]:
    """What reloads or runs an export takes its format and sizes."""
    if export.in_fp8 and "logits" in export.check:
        yield from fp8_reader_problems()
    for name in export.engines if parent.attention_heads else ():
        if (rule := unfit(name, parent.attention_channels)) is not None:
            yield Problem("export.check", list(export.check), rule, f"leave {name} out")


def _removal_problems(section: ImportanceSection, num_layers: int) -> Iterator[Problem]:
    """Scoring layers leaves at least one."""
    if section.depth in ("iterative", "one_shot") and num_layers == 1:
        rule = "the parent has one layer, and none to remove"
        yield Problem("importance.depth", section.depth, rule, "nearest legal value is none")
    elif section.depth == "iterative" and (section.max_removed_layers or 1) >= num_layers:
        rule = f"must be below the parent's {num_layers} layers"
        remedy = f"nearest legal value is {num_layers - 1}, null goes as far as it can"
        yield Problem("importance.max_removed_layers", section.max_removed_layers, rule, remedy)


def _lane_problems(parent: ModelShape, lanes: int) -> Iterator[Problem]:
    """FFN neurons are dealt to lanes of equal size."""
    width = math.gcd(*parent.ffn)
    if width % lanes:
        remedy = f"nearest legal value is {nearest_divisor(lanes, width)}"
        yield Problem("lanes", lanes, f"must divide the parent's FFN width = {width}", remedy)


def _nesting_problems(config: ElasticRunConfig, record: Record, name: str, path: str) -> Iterator[Problem]:
    """The family is trained from a permuted parent, with the lanes it was permuted for."""
    if record.kind not in ("permuted_parent", "elastic"):
        rule = f"holds a {record.kind}, whose channels are not in the order of their importance"
        yield Problem(name, path, rule, "give what recipes/estimate_importance.py wrote")
    elif record.lanes != config.elastic.space.lanes:
        rule = f"must be the lanes the parent was permuted for = {record.lanes}"
        yield Problem("elastic.space.lanes", config.elastic.space.lanes, rule, f"nearest legal value is {record.lanes}")
    yield from model_problems(config.model, record, path)


def _named_files(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List (field, path) of the files whose content takes their place in the config."""
    for field in ("subnets", "latency", "init_from.subnets", "elastic.deployment.latency"):
        found: Any = values
        for name in field.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(found, str):
            yield field, found


def output_problems(config: object, named: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem if the run folder or file holds something that the config neither continues nor replaces.

    `named` are files that have been read, by field.
    """
    if isinstance(config, CostConfig | GenerateConfig):  # a run that is priced has a folder, but it is not written to
        yield from output_file_problems(config)
        return
    if not isinstance(config, VerbConfig):
        return
    manager = config.exp_manager
    folder = Path(manager.run_dir)
    if manager.overwrite:
        remedy = f"set exp_manager.version={free_version(folder)}"
        for name, path in (*input_paths(config), *named.items()):
            if path is not None and Path(path).resolve().is_relative_to(folder.resolve()):
                rule = f"would remove {name} = {path}, which this verb reads"
                yield Problem("exp_manager.overwrite", True, rule, remedy)
        if not is_left_over(folder, resume=True) and not is_of_a_run(folder):
            rule = f"replaces runs alone, and {folder} holds no config.json of one"
            yield Problem("exp_manager.overwrite", True, rule, f"{remedy}, or remove the folder by hand")
    goes_on = isinstance(config, TrainConfig) and config.exp_manager.resume_if_exists
    # An import cut short goes on, and nobody misses what a refused start left.
    if manager.overwrite or goes_on or is_left_over(folder, resume=isinstance(config, ImportConfig)):
        return
    ways = ["exp_manager.overwrite=true"]
    if isinstance(config, TrainConfig):
        ways.append("exp_manager.resume_if_exists=true")
    remedy = f"nearest free name is {free_version(folder)}, or set {' or '.join(ways)}"
    yield Problem("exp_manager.version", manager.version, f"the folder {folder} is not empty", remedy)


def free_version(folder: Path) -> str:
    """Return the first of version_0, version_1, ... that does not exist beside `folder`."""
    names = (f"version_{number}" for number in itertools.count())
    return next(name for name in names if not (folder.parent / name).exists())
