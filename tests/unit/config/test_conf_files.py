"""Every run in conf/ says how to use it, loads through Hydra, and is legal; overrides reach the dataclasses."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from elastic.config.load import ConfigError, load
from elastic.config.rules import rule_problems
from elastic.config.rules_layout import Cluster
from elastic.config.tasks import EvaluateTasksConfig
from elastic.config.verbs import (
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    GenerateConfig,
    ImportanceConfig,
    ImportConfig,
    PretrainConfig,
    SearchConfig,
    with_vocab,
)
from elastic.corpus.config import PrepareConfig
from elastic.plan.config import PlanConfig
from elastic.space.axes import Axis
from elastic.verbs.parent import fill_from_parent
from recipes import _verbs
from recipes._common import CONF, hydra_arguments
from tests.unit.config.configs import ONE_PROCESS, legal

WHOLE_RUNS: dict[str, type] = {
    "prepare_data": PrepareConfig,
    "pretrain_parent": PretrainConfig,
    "estimate_importance": ImportanceConfig,
    "train_elastic": ElasticConfig,
    "smoke_elastic": ElasticConfig,
    "elastic_12b": ElasticConfig,
    "elastic_9b": ElasticConfig,
    "importance_12b": ImportanceConfig,
    "evaluate": EvaluateConfig,
    "evaluate_12b": EvaluateConfig,
    "evaluate_tasks": EvaluateTasksConfig,
    "extract": ExtractConfig,
    "search": SearchConfig,
    "import_hf": ImportConfig,
    "generate": GenerateConfig,
    "plan": PlanConfig,
}
STARTED_ON = {
    "elastic_12b": Cluster(num_processes=512, has_gpu=True),
    "elastic_9b": Cluster(num_processes=512, has_gpu=True),
    "importance_12b": Cluster(num_processes=8, has_gpu=True),
    "evaluate_12b": Cluster(num_processes=8, has_gpu=True),
    "import_hf": ONE_PROCESS,
    "evaluate_tasks": ONE_PROCESS,
    "extract": ONE_PROCESS,
    "generate": ONE_PROCESS,
    "plan": ONE_PROCESS,
}
TWO_CORES = Cluster(num_processes=2)
# What a user must say where a file cannot leave ???: one of two fields, or a list.
SAID_BY_USER = {
    "generate": ("init_from.checkpoint=run", "prompts=[once]"),
    "evaluate_tasks": ("init_from.checkpoint=run", "tasks=[mine]"),
}
SMOKE_VOCAB = 2048
TINY = dict(
    pattern="M-|M*-", vocab_multiple=32, hidden=64, ffn=128, mamba_heads=8, head_channels=8, mamba_groups=4,
    attention_heads=8, kv_heads=4, attention_channels=16,
)  # fmt: skip
GROUPS = {"budgets", "cluster", "exp_manager", "parallel", "space", "trainer"}
STUDY = "study"  # questions, which recipes/study.py reads: no configs of a verb (tests/unit/recipes/test_study.py)


def composed(name: str, *arguments: str) -> dict[str, Any]:
    """Compose a whole run as a recipe would, with ??? filled in."""
    values = OmegaConf.to_container(compose_once(name, arguments), resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return filled({str(key): value for key, value in values.items()})


@cache
def compose_once(name: str, arguments: tuple[str, ...]) -> DictConfig:
    """Compose a whole run once for all tests of this file."""
    overrides = [override for override in hydra_arguments(arguments) if not override.startswith("hydra.")]
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        return compose(name, overrides)


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put a path wherever the file leaves one to the user."""
    return {
        key: filled(value) if isinstance(value, Mapping) else "given/by/user" if value == "???" else value
        for key, value in values.items()
    }


def unstated_fields(kind: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """List the dotted path of every field that `values` leaves to its default, in sections and in lists of them."""
    for name, hint in get_type_hints(kind).items():
        if name not in values:
            yield prefix + name
            continue
        for section in (hint, *get_args(hint)):
            if not isinstance(section, type) or not is_dataclass(section) or values[name] is None:
                continue
            given = values[name] if isinstance(values[name], list) else [values[name]]
            for entry in given:
                yield from unstated_fields(section, entry, f"{prefix}{name}.")


def test_the_list_of_whole_runs_is_complete() -> None:
    assert {file.stem for file in CONF.glob("*.yaml")} == set(WHOLE_RUNS)


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_a_run_starts_with_what_how_where_how_long_and_what_comes_out(file: Path) -> None:
    """A file of a group says only what it is: what a run takes and leaves is the run's to say."""
    text = file.read_text(encoding="utf-8")
    header = re.match(r"(?:#.*\n)+", text)
    assert header is not None, "no comment at the top"
    keys = [line.partition(":")[0] for line in header[0].splitlines()]
    expected = ["# Command", "# Hardware", "# Time", "# Result"] if file.parent == CONF else []
    assert [key for key in keys if key in ("# Command", "# Hardware", "# Time", "# Result")] == expected
    assert isinstance(yaml.safe_load(text), dict)


def test_configs_stay_few() -> None:
    """A verb has a file. What belongs to one run stands in it; a group is for what users switch."""
    assert len([file for file in CONF.rglob("*.yaml") if file.parent.name != STUDY]) <= 25 + len(_verbs.VERBS)
    assert {folder.name for folder in CONF.iterdir() if folder.is_dir()} <= GROUPS | {STUDY}


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_whole_run_is_legal(name: str) -> None:
    kind, cluster = WHOLE_RUNS[name], STARTED_ON.get(name, TWO_CORES)
    composed_values = composed(name, *SAID_BY_USER.get(name, ()))
    if name == "train_elastic":
        composed_values["model"] = composed("smoke_elastic")["model"]  # its own says: what the parent is
    values, problems, _ = fill_from_parent(kind, composed_values)
    assert not problems
    config = legal(kind, values, cluster)
    if isinstance(config, PretrainConfig | ElasticConfig):
        assert rule_problems(with_vocab(config, SMOKE_VOCAB), cluster) == ()


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_whole_run_states_every_field(name: str) -> None:
    """A default hidden in the code would be a choice nobody sees. What a phase has not of its own is the run's."""
    left_open = ("model", *(f"elastic.space.{axis}.choices" for axis in Axis)) if name == "train_elastic" else ()
    unstated = unstated_fields(WHOLE_RUNS[name], composed(name))
    inherited = ("curriculum.parallel", "curriculum.micro_batch")
    assert [field for field in unstated if field not in left_open and not field.startswith(inherited)] == []


def group_options() -> Iterator[tuple[str, str]]:
    """List (group, option) of every file in a group."""
    for file in sorted(CONF.glob("*/*.yaml")):
        if file.parent.name != STUDY:
            yield file.parent.name, file.stem


@pytest.mark.parametrize(("group", "option"), group_options())
def test_every_option_of_a_group_loads_in_a_whole_run(group: str, option: str) -> None:
    """Types and single values of every group file hold; what it fits together with is the whole run's matter."""
    names = {
        "exp_manager": "train_elastic" if option == "training" else "evaluate",
        "cluster": "plan",
    }
    name = names.get(group, "train_elastic")
    values = composed(name, f"{group}={option}")
    if group == "exp_manager":
        values["exp_manager"]["name"] = "given"
    if name == "train_elastic":
        values.setdefault("model", {"vocab": 512})
    load(WHOLE_RUNS[name], fill_from_parent(WHOLE_RUNS[name], values)[0])


def test_choices_by_share_fit_a_tiny_model_in_the_small_layout_with_all_kinds_of_ranks() -> None:
    values = composed("train_elastic", "parallel=tp2_pp2", "budgets=halves") | {"model": TINY}
    config = load(ElasticConfig, fill_from_parent(ElasticConfig, values)[0])
    assert rule_problems(with_vocab(config, 500), Cluster(num_processes=4)) == ()


def test_plain_overrides_reach_the_dataclasses() -> None:
    arguments = ("seed=7", "curriculum.1.steps=3", "trainer.max_steps=5", "model.vocab=128", "model.hidden=64")
    arguments += ("curriculum.1.parallel.context=8",)
    config = load(ElasticConfig, fill_from_parent(ElasticConfig, composed("train_elastic", *arguments))[0])
    assert (config.seed, config.model.hidden, config.model.vocab) == (7, 64, 128)
    assert (config.curriculum[0].steps, config.curriculum[1].steps) == (120, 3)
    assert [config.of(phase).parallel.context for phase in config.curriculum] == [1, 8]
    assert config.trainer.max_steps == 5


def test_misspelled_overrides_are_answered_together_with_the_nearest_name() -> None:
    values = composed("smoke_elastic", "sed=7", "trainer.max_stepz=5", "curriculum.0.step=1")
    with pytest.raises(ConfigError) as caught:
        load(ElasticConfig, values)
    assert [(problem.field, problem.remedy) for problem in caught.value.problems] == [
        ("sed", "did you mean seed?"),
        ("trainer.max_stepz", "did you mean trainer.max_steps?"),
        ("curriculum.0.step", "did you mean curriculum.0.steps?"),
    ]


def test_arguments_keep_their_meaning_for_hydra() -> None:
    arguments = [
        "a.b=1",
        "--config-name",
        "smoke_elastic",
        "budgets=smoke",
        "+x=1",
        "~y",
        "hydra.verbose=true",
        "-c",
        "job",
    ]
    assert hydra_arguments(arguments) == [
        "--config-name",
        "smoke_elastic",
        "-c",
        "job",
        "++a.b=1",
        "budgets=smoke",
        "+x=1",
        "~y",
        "hydra.verbose=true",
        "hydra.job.chdir=false",
    ]
