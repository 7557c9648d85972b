"""Legal small configs of every verb with the folders they name, and the error that a changed one gets."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from elastic.checkpoint.contents import write_contents
from elastic.checkpoint.record import Record
from elastic.config.load import ConfigError, Problem, load_with_problems
from elastic.config.rules import rule_problems
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ModelConfig
from elastic.config.tasks import EvaluateTasksConfig
from elastic.config.verbs import (
    CostConfig,
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    GenerateConfig,
    ImportanceConfig,
    ImportConfig,
    PretrainConfig,
    SearchConfig,
)
from elastic.corpus.config import PrepareConfig
from elastic.data.manifest import Manifest, TokenizerRecord
from recipes._common import read_config

VERBS = (
    PretrainConfig,
    ImportanceConfig,
    ElasticConfig,
    CostConfig,
    EvaluateConfig,
    SearchConfig,
    EvaluateTasksConfig,
    ExtractConfig,
    GenerateConfig,
    ImportConfig,
    PrepareConfig,
)
INPUTS: dict[type, dict[str, Any]] = {
    PretrainConfig: {"data.path": "text"},
    ImportanceConfig: {"data.path": "text", "init_from.parent": "parent"},
    ElasticConfig: {"data.path": "text", "init_from.permuted_parent": "parent"},
    CostConfig: {"data.path": "text", "model.pattern": "M-M*-"},
    EvaluateConfig: {"data.path": "text", "init_from.checkpoint": "family"},
    SearchConfig: {"data.path": "text", "init_from.checkpoint": "family"},
    EvaluateTasksConfig: {"init_from.checkpoint": "family", "tasks": ["mine"]},
    ExtractConfig: {"init_from.checkpoint": "family"},
    GenerateConfig: {"init_from.checkpoint": "family", "prompts": ["once"]},
    ImportConfig: {"source": "folder"},
    PrepareConfig: {},
}
FAMILY: dict[str, Any] = {
    "model.vocab": 512,
    "elastic.space.ffn": {"choices": [256, 192, 128], "per_layer": True},
    "elastic.space.mamba_head": {"choices": [8, 6, 4]},
    "elastic.space.depth": {"choices": [5, 4, 3]},
    "elastic.budgets": [{"name": "full", "ratio": 1.0}, {"name": "small", "ratio": 0.7}],
    "curriculum": [
        {"name": "short", "steps": 10, "budget_weights": {"full": 1, "small": 2}},
        {"name": "long", "tokens": 4096, "router_frozen": True, "execution": "slice", "temperature": [0.1, 0.1]},
    ],
}


def put(values: dict[str, Any], path: str, value: object) -> None:
    """Set one dotted path of nested dicts and lists, making sections on the way."""
    *parents, last = path.split(".")
    node: Any = values
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[int(last) if isinstance(node, list) else last] = copy.deepcopy(value)


def values_of(kind: type, changes: Mapping[str, object]) -> dict[str, Any]:
    """Return the plain values of a legal small config of a verb, with some paths changed."""
    values: dict[str, Any] = {}
    for path, value in (INPUTS[kind] | (FAMILY if kind is ElasticConfig else {}) | dict(changes)).items():
        put(values, path, value)
    return values


ONE_PROCESS = Cluster()


def found(kind: type, values: Mapping[str, Any], cluster: Cluster = ONE_PROCESS) -> tuple[Any, tuple[Problem, ...]]:
    """Return the config and its problems as `load_run` collects them, before it looks at the files it names."""
    config, problems = load_with_problems(kind, values)
    unreliable = frozenset(problem.section for problem in problems)
    return config, problems + rule_problems(config, cluster, unreliable)


def legal[T](kind: type[T], values: Mapping[str, Any], cluster: Cluster = ONE_PROCESS) -> T:
    """Return the config, whose every field and rule holds."""
    config, problems = found(kind, values, cluster)
    assert problems == ()
    return config


DATA_TOKENS = 300


def written_record(folder: Path, kind: str = "permuted_parent", mamba_groups: int = 2, **more: Any) -> str:
    """Make `folder` look like a checkpoint, with 8 lanes where nothing else is said."""
    folder.mkdir()
    Record(kind, ModelConfig(vocab=512, mamba_groups=mamba_groups).shape(), **({"lanes": 8} | more)).write(folder)
    write_contents(folder, {})
    return str(folder)


def written_manifest(folder: Path, sha256: str = "") -> str:
    """Make `folder` look like prepared data of a small tokenizer."""
    folder.mkdir(exist_ok=True)
    tokenizer = TokenizerRecord(vocab_size=DATA_TOKENS, eos_token="<end>", eos_id=0, trained=True, sha256=sha256)
    Manifest({}, {}, 1, {}, False, "", tokenizer, "uint16", {}).write(folder)
    return str(folder)


class ProblemsOf:
    """Reads a config as every recipe does (`read_config`), on a number of processes that torchrun would announce."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, kind: type, changes: Mapping[str, object], num_processes: int = 1) -> list[str]:
        """Return the lines of the error that a changed config gets; no process group exists by then."""
        self.monkeypatch.setenv("WORLD_SIZE", str(num_processes))
        with pytest.raises(ConfigError) as caught:
            read_config(OmegaConf.create(values_of(kind, changes)), kind)
        assert not torch.distributed.is_initialized()
        heading, *lines = str(caught.value).splitlines()
        assert heading == f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration:"
        return [line.removeprefix("  ") for line in lines]


BadConfig = tuple[type, dict[str, object], int, str]
