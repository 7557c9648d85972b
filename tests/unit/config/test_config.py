"""What a legal config is turned into, and that every field of it is read by somebody."""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from elastic.config.inputs import SubnetConfig
from elastic.config.load import config_dict, load
from elastic.config.rules import rule_problems
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ModelConfig, SpaceConfig
from elastic.config.tasks import EvaluateTasksConfig
from elastic.config.verbs import (
    ElasticConfig,
    EvaluateConfig,
    GenerateConfig,
    ImportanceConfig,
    PretrainConfig,
    SearchConfig,
    with_vocab,
)
from elastic.router.draw import RouterSettings
from elastic.router.phases import Curriculum, ElasticPhase, Phase
from elastic.space.axes import Axis
from elastic.space.cost import COUNTED, Budget, Metric, shape_cost
from elastic.space.gates import Execution
from elastic.space.space import AxisChoices
from tests.unit.config.configs import VERBS, legal, values_of
from tests.unit.config.test_conf_files import composed

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("kind", VERBS)
def test_pitfall_14_default_config_is_legal(kind: type) -> None:
    # No default for what is read, one of two fields, nor for what the family may choose.
    missing = (
        ["data.path"] if kind in (PretrainConfig, ElasticConfig, ImportanceConfig, EvaluateConfig, SearchConfig) else []
    )
    missing += ["elastic.space"] if kind is ElasticConfig else []
    if kind not in (GenerateConfig, EvaluateTasksConfig):  # their weights are one of two fields, too
        assert [problem.field for problem in rule_problems(kind(), Cluster())] == missing
    legal(kind, values_of(kind, {}))


def test_pitfall_25_full_budget_may_be_left_out() -> None:
    changes = {"elastic.budgets": [{"name": "small", "ratio": 0.7}], "curriculum.0.budget_weights": {"small": 1}}
    config = legal(ElasticConfig, values_of(ElasticConfig, changes))
    assert [budget.name for budget in config.budgets()] == ["small"]


def test_pitfall_10_ratio_and_target_are_two_fields() -> None:
    """The full budget as a share of 1 is the parent's own cost, in the units of its metric."""
    metrics = [{"name": str(metric), "metric": str(metric), "ratio": 1.0} for metric in COUNTED]
    changes = {"elastic.budgets": metrics, "curriculum.0.budget_weights": {}}
    config = legal(ElasticConfig, values_of(ElasticConfig, changes))
    full = shape_cost(config.model.shape(), config.elastic.deployment)
    assert [budget.limit for budget in config.budgets()] == [full[metric] for metric in COUNTED]


@pytest.mark.parametrize("kind", VERBS)
def test_plain_values_read_back_to_the_same_config(kind: type) -> None:
    config = load(kind, values_of(kind, {}))
    assert load(kind, config_dict(config)) == config


def test_numbers_written_as_floats_become_whole_and_whole_become_floats() -> None:
    changes: dict[str, object] = {"curriculum": [{"name": "a", "tokens": 65e9, "lr": {"peak": 1, "min": 0}}]}
    phase = load(PretrainConfig, values_of(PretrainConfig, changes)).curriculum[0]
    assert phase.tokens == 65_000_000_000 and type(phase.tokens) is int
    assert type(phase.lr.peak) is float


def test_tokens_round_up_to_whole_steps() -> None:
    phase = Phase(name="a", sequence_length=8, global_batch=4, tokens=65)
    assert phase.num_steps == 3
    assert Curriculum((phase, Phase(name="b", steps=5))).total_steps == 8


def test_null_vocabulary_is_padded_for_every_tensor_parallel_size() -> None:
    config = with_vocab(PretrainConfig(model=ModelConfig(vocab_multiple=128)), 2047)
    assert config.model.shape().vocab == 2048
    assert with_vocab(config, 9999) is config
    with pytest.raises(ValueError, match=r"model\.vocab"):
        PretrainConfig().model.shape()


def test_space_section_names_every_axis() -> None:
    changes = {f"elastic.space.{axis}": {"choices": [full, full - 8]} for axis, full in _full_widths().items()}
    config = load(ElasticConfig, values_of(ElasticConfig, changes))
    assert {axis: choices.choices for axis, choices in config.elastic.space.axes().items()} == {
        Axis(axis): (full, full - 8) for axis, full in _full_widths().items()
    }


def test_a_space_keeps_an_attention_layer_unless_told_otherwise() -> None:
    parent, depth = ModelConfig(pattern="MM-*", vocab=64).shape(), AxisChoices((4, 1))
    assert SpaceConfig(depth=depth).space(parent).kept_layers(1) == (3,)
    assert SpaceConfig(depth=depth, keep_at_least={}).space(parent).kept_layers(1) == (0,)
    for run in ("train_elastic", "smoke_elastic", "elastic_12b", "elastic_9b"):
        assert composed(run)["elastic"]["space"]["keep_at_least"] == {"attention": 1}


def _full_widths() -> dict[str, int]:
    return {
        "hidden": 128,
        "ffn": 256,
        "mamba_head": 16,
        "mamba_channel": 16,
        "attention_head": 16,
        "depth": 16,
    }


def test_subnet_by_hand_fills_in_what_is_not_given() -> None:
    parent = ModelConfig(vocab=512).shape()
    given = SubnetConfig(name="mine", hidden=64, ffn=(128,), kept_layers=(0, 1, 4))
    subnet = given.subnet(parent)
    assert (subnet.hidden, subnet.ffn, subnet.kept_layers) == (64, (128, 128), (0, 1, 4))
    assert (subnet.mamba_heads, subnet.head_channels) == (parent.mamba_heads, parent.head_channels)
    assert SubnetConfig(name="all").subnet(parent).shape(parent) == parent
    with pytest.raises(ValueError, match="hidden = 999"):
        SubnetConfig(name="wide", hidden=999).subnet(parent)


def test_budget_weights_and_router_defaults_are_the_published_ones() -> None:
    phase, router = ElasticPhase(name="a", steps=1), RouterSettings()
    assert (phase.temperature, phase.logit_scale, phase.router_lr.peak) == ((1.0, 0.05), (1.0, 10.0), 1e-2)
    assert (router.hidden_width, router.budget_loss_weight) == (256, 1.0)
    assert Budget(name="b", ratio=0.5).metric is Metric.PARAMS


def test_curriculum_reaches_the_loop_in_the_order_of_the_budgets() -> None:
    changes = {"curriculum.0.budget_weights": {"small": 2}, "curriculum.0.lr": {"peak": 3.0, "min": 1.0}}
    changes["curriculum.0.lr"] |= {"warmup_steps": 2, "schedule": "cosine"}
    config = legal(ElasticConfig, values_of(ElasticConfig, changes))
    short, long = config.curriculum
    assert (short.weights(["full", "small"]), long.weights(["full", "small"])) == ((0.0, 2.0), (1.0, 1.0))
    assert (short.execution, long.execution) == (Execution.MASK, Execution.SLICE)
    assert (short.router_frozen, long.router_frozen) == (False, True)
    assert [short.lr.at(step, short.num_steps) for step in (0, 1, 2, 9)] == [1.5, 3.0, 3.0, 1.0]
    end = Curriculum(config.curriculum).at(short.num_steps - 1)
    assert (end.temperature, end.logit_scale) == pytest.approx((0.05, 10.0))
    (pretrain,) = PretrainConfig().curriculum
    assert pretrain.num_steps == 100 and type(pretrain) is Phase


def config_fields(kind: type) -> Iterator[tuple[str, str]]:
    """List (dataclass, field) of a config and all its sections."""
    for name, hint in get_type_hints(kind).items():
        yield kind.__name__, name
        for inner in dataclasses_in(hint):
            yield from config_fields(inner)


def dataclasses_in(hint: Any) -> Iterator[type]:
    """List the dataclasses in an annotation."""
    if isinstance(hint, type) and is_dataclass(hint):
        assert fields(hint)
        yield hint
    for argument in get_args(hint):
        yield from dataclasses_in(argument)


def test_pitfall_7_every_field_is_read_by_somebody() -> None:
    """A field that only the rules look at would be a silent no-op."""
    config = ROOT / "elastic" / "config"
    rules = {config / "load.py", *config.glob("rules*.py")}
    read = {
        node.attr
        for folder in ("elastic", "recipes")
        for file in (ROOT / folder).rglob("*.py")
        if file not in rules
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    } | {axis.value for axis in Axis}  # SpaceConfig.axes reads them by name
    unread = {f"{owner}.{name}" for kind in VERBS for owner, name in config_fields(kind) if name not in read}
    assert unread == set()
