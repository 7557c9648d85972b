"""Every wrong config gets one error before anything starts, naming field, value, rule and what would be legal."""

import ast
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from elastic.space.axes import Axis
from elastic.space.cost import Metric, shape_cost
from elastic.space.gates import Execution
from elastic.train.config import (
    CostConfig,
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    ImportanceConfig,
    ImportConfig,
    PretrainConfig,
    SubnetConfig,
    total_steps,
    with_vocab,
)
from elastic.train.config_elastic import BudgetConfig, ElasticPhaseConfig, PhaseConfig, RouterConfig
from elastic.train.config_files import load_run
from elastic.train.config_load import ConfigError, config_dict, load
from elastic.train.config_rules import check, load_and_check
from elastic.train.config_rules_layout import Cluster
from elastic.train.config_sections import ModelConfig
from elastic.train.prepare_config import PrepareConfig
from elastic.train.record import Record

ROOT = Path(__file__).parents[2]
VERBS = (
    PretrainConfig,
    ImportanceConfig,
    ElasticConfig,
    CostConfig,
    EvaluateConfig,
    ExtractConfig,
    ImportConfig,
    PrepareConfig,
)
INPUTS: dict[type, dict[str, Any]] = {
    PretrainConfig: {"data.path": "text"},
    ImportanceConfig: {"data.path": "text", "init_from.parent": "parent"},
    ElasticConfig: {"data.path": "text", "init_from.permuted_parent": "parent"},
    CostConfig: {},
    EvaluateConfig: {"data.path": "text", "init_from.checkpoint": "family"},
    ExtractConfig: {"init_from.checkpoint": "family"},
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


def problems_of(kind: type, changes: Mapping[str, object], cluster: Cluster) -> list[str]:
    """Return the lines of the error that a changed config gets."""
    with pytest.raises(ConfigError) as caught:
        load_and_check(kind, values_of(kind, changes), cluster)
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration:"
    return [line.removeprefix("  ") for line in lines]


# verb, changes, number of processes, the one line of the error: field = value: rule; remedy
BAD: tuple[tuple[type, dict[str, object], int, str], ...] = (
    # unknown keys
    (
        ElasticConfig,
        {"modle": {}},
        1,
        "modle = {}: unknown key; did you mean model?",
    ),
    (
        ElasticConfig,
        {"trainer.max_step": 5},
        1,
        "trainer.max_step = 5: unknown key; did you mean trainer.max_steps?",
    ),
    (
        ElasticConfig,
        {"elastic.clip_grad": 1.0},
        1,
        "elastic.clip_grad = 1.0: unknown key; did you mean optim.clip_grad?",
    ),
    (
        PretrainConfig,
        {"parallel.virtual": 2},
        1,
        "parallel.virtual = 2: unknown key; known here: tensor, pipeline, context, sequence, recompute",
    ),
    (
        ElasticConfig,
        {"curriculum.0.lr": {"peek": 0.1}},
        1,
        "curriculum.0.lr.peek = 0.1: unknown key; did you mean curriculum.0.lr.peak?",
    ),
    # missing
    (
        PretrainConfig,
        {"data.path": ""},
        1,
        "data.path = null: missing, it has no default; set data.path=..., the folder recipes/prepare_data.py wrote",
    ),
    (
        ImportConfig,
        {"source": "???"},
        1,
        "source = null: missing, it has no default; set source=..., a Hugging Face folder with config.json and "
        "safetensors files",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1": {"ratio": 0.7}, "curriculum.0.budget_weights": {}},
        1,
        "elastic.budgets.1.name = null: missing, it has no default; set elastic.budgets.1.name=..., give it a name",
    ),
    # wrong types
    (
        PretrainConfig,
        {"model.hidden": "wide"},
        1,
        'model.hidden = "wide": must be a whole number; the default is 128',
    ),
    (
        PretrainConfig,
        {"model.hidden": 100.5},
        1,
        "model.hidden = 100.5: must be a whole number; nearest legal value is 100",
    ),
    (
        PretrainConfig,
        {"seed": True},
        1,
        "seed = true: must be a whole number; the default is 1234",
    ),
    (
        PretrainConfig,
        {"model.tied_embeddings": "no"},
        1,
        'model.tied_embeddings = "no": must be true or false; the default is false',
    ),
    (
        PretrainConfig,
        {"exp_manager.version": 3},
        1,
        'exp_manager.version = 3: must be a text; write it in quotes, "3"',
    ),
    (
        PretrainConfig,
        {"optim.eps": math.nan},
        1,
        "optim.eps = NaN: must be a finite number; the default is 1e-08",
    ),
    (
        PretrainConfig,
        {"parallel": 2},
        1,
        "parallel = 2: must be a section; with keys tensor, pipeline, context, sequence, recompute",
    ),
    (
        ElasticConfig,
        {"elastic.space.ffn.choices": 256},
        1,
        "elastic.space.ffn.choices = 256: must be a list; write [256] for one entry",
    ),
    (
        ElasticConfig,
        {"curriculum.0.temperature": [1.0]},
        1,
        "curriculum.0.temperature = [1.0]: must have 2 entries; the default is [1.0, 0.05]",
    ),
    (
        ElasticConfig,
        {"curriculum.0.budget_weights": ["full"]},
        1,
        'curriculum.0.budget_weights = ["full"]: must map names to values; it has no default',
    ),
    # illegal values of one field
    (
        PretrainConfig,
        {"data.micro_batch": 0},
        1,
        "data.micro_batch = 0: must be at least 1; nearest legal value is 1",
    ),
    (
        PretrainConfig,
        {"model.norm_epsilon": 0},
        1,
        "model.norm_epsilon = 0.0: must be above 0; the default is 1e-05",
    ),
    (
        PretrainConfig,
        {"optim.adam_beta2": 1.0},
        1,
        "optim.adam_beta2 = 1.0: must be below 1; the default is 0.98",
    ),
    (
        PretrainConfig,
        {"trainer.precision": "bf_16"},
        1,
        'trainer.precision = "bf_16": must be one of fp32, bf16; nearest legal value is bf16',
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1": {"name": "small", "metric": "param", "ratio": 0.7}},
        1,
        'elastic.budgets.1.metric = "param": must be one of params, weight_bytes, deploy_bytes, flops_per_token; '
        "nearest legal value is params",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1.ratio": 1.5},
        1,
        "elastic.budgets.1.ratio = 1.5: must be at most 1; nearest legal value is 1",
    ),
    (
        PretrainConfig,
        {"curriculum": []},
        1,
        'curriculum = []: must not be empty; the default is [{"name": "pretrain", "sequence_length": 256, '
        '"global_bat...',
    ),
    # sizes of the model
    (
        PretrainConfig,
        {"model.mamba_heads": 9},
        1,
        "model.mamba_heads = 9: must be a multiple of model.mamba_groups = 2; nearest legal value is 8",
    ),
    (
        PretrainConfig,
        {"model.attention_heads": 5},
        1,
        "model.attention_heads = 5: must be a multiple of model.kv_heads = 2; nearest legal value is 4",
    ),
    (
        PretrainConfig,
        {"model.pattern": "ME*"},
        1,
        "model.pattern = \"ME*\": layer pattern 'ME*': character 'E' at position 1 is not one of M - * (and | between "
        "pipeline stages). Mixture-of-experts and multi-token-prediction layers are not supported; write a pattern "
        "like M-M*-",
    ),
    # the parallel layout
    (
        PretrainConfig,
        {"parallel.tensor": 2},
        3,
        "parallel.tensor x pipeline x context = 2: must divide the number of processes = 3; nearest legal value is 1, "
        "or start 4 processes",
    ),
    (
        PretrainConfig,
        {"parallel.sequence": True},
        1,
        "parallel.sequence = true: splits the sequence over tensor-parallel ranks and needs parallel.tensor > 1; "
        "nearest legal value is false",
    ),
    (
        PretrainConfig,
        {"parallel.tensor": 4, "model.vocab": 512},
        4,
        "parallel.tensor = 4: must divide model.mamba_groups = 2, model.kv_heads = 2; nearest legal value is 2",
    ),
    (
        PretrainConfig,
        {"parallel.tensor": 2, "model.vocab": 511},
        2,
        "parallel.tensor = 2: must divide model.vocab = 511; nearest legal value is 1",
    ),
    (
        ElasticConfig,
        {"parallel.tensor": 2, "elastic.space.lanes": 1},
        2,
        "parallel.tensor = 2: must divide lanes = 1; nearest legal value is 1",
    ),
    (
        PretrainConfig,
        {"parallel.pipeline": 6},
        6,
        "parallel.pipeline = 6: must be at most the number of layers = 5; nearest legal value is 5",
    ),
    (
        PretrainConfig,
        {"parallel.pipeline": 2, "model.pattern": "M-|M*|-"},
        2,
        "parallel.pipeline = 2: must be the 3 stages the | in model.pattern mark; nearest legal value is 3",
    ),
    (
        PretrainConfig,
        {"parallel.context": 3, "curriculum": [{"name": "a", "steps": 1, "sequence_length": 258}]},
        3,
        "parallel.context = 3: must divide, or be a multiple of, the Mamba groups of one tensor-parallel rank = 2; "
        "nearest legal value is 2",
    ),
    (
        ElasticConfig,
        {"parallel.context": 4},
        4,
        "elastic.space.mamba_head.choices.1 = 6: must be a multiple of parallel.tensor x parallel.context = 4; nearest "
        "legal value is 8",
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 1, "sequence_length": 255}], "parallel.context": 2},
        2,
        "curriculum.0.sequence_length = 255: must be a multiple of what parallel.context and parallel.sequence split "
        "it into = 4; nearest legal value is 256",
    ),
    # batches
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 1, "global_batch": 7}]},
        2,
        "curriculum.0.global_batch = 7: must be a multiple of data.micro_batch x data-parallel size = 1 x 2 = 2; "
        "nearest legal value is 8",
    ),
    (
        PretrainConfig,
        {"data.validation_sequences": 15, "data.micro_batch": 4},
        2,
        "data.validation_sequences = 15: must be a multiple of data.micro_batch x data-parallel size = 4 x 2 = 8; "
        "nearest legal value is 16",
    ),
    (
        ImportanceConfig,
        {"importance.num_sequences": 30},
        1,
        "importance.num_sequences = 30: must be a multiple of importance.micro_batch x data-parallel size = 4 x 1 = 4; "
        "nearest legal value is 32",
    ),
    (
        ImportanceConfig,
        {"importance.depth_sequences": 128},
        1,
        "importance.depth_sequences = 128: must be at most importance.num_sequences = 64; nearest legal value is 64",
    ),
    (
        EvaluateConfig,
        {"sequence_length": 30, "parallel.context": 4},
        4,
        "sequence_length = 30: must be a multiple of what parallel.context and parallel.sequence split it into = 8; "
        "nearest legal value is 32",
    ),
    # optimizer and run folder
    (
        PretrainConfig,
        {"optim.use_distributed_optimizer": True},
        1,
        "optim.use_distributed_optimizer = true: needs GPUs (resuming it with torch's AdamW on the CPU is broken "
        "upstream); nearest legal value is false",
    ),
    (
        ElasticConfig,
        {"optim.overlap_grad_reduce": True},
        1,
        "optim.overlap_grad_reduce = true: a skipped layer gets no gradient, so its bucket is never ready in "
        "curriculum.1.execution = slice; nearest legal value is false",
    ),
    (
        PretrainConfig,
        {"trainer.watchdog_timeout_s": 900},
        1,
        "trainer.watchdog_timeout_s = 900.0: must be below trainer.collective_timeout_s = 900; two thirds of it, 600, "
        "leaves time for the report",
    ),
    (
        PretrainConfig,
        {"exp_manager.overwrite": True},
        1,
        "exp_manager.overwrite = true: contradicts exp_manager.resume_if_exists = true; nearest legal value is false",
    ),
    # the curriculum
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 1, "tokens": 10}]},
        1,
        "curriculum.0.steps = 1: exactly one of steps and tokens must be given; set curriculum.0.steps=null",
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a"}]},
        1,
        "curriculum.0.steps = null: exactly one of steps and tokens must be given; set curriculum.0.steps or "
        "curriculum.0.tokens",
    ),
    (
        ElasticConfig,
        {"curriculum.1.name": "short"},
        1,
        'curriculum.1.name = "short": names must differ, this one stands 2 times; choose another, for example short_2',
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 5, "lr": {"peak": 0.1, "min": 0.2}}]},
        1,
        "curriculum.0.lr.min = 0.2: must be at most curriculum.0.lr.peak = 0.1; nearest legal value is 0.1",
    ),
    (
        ElasticConfig,
        {"curriculum.0.router_lr": {"warmup_steps": 60}},
        1,
        "curriculum.0.router_lr.warmup_steps = 60: must be at most the 10 steps of phase short; nearest legal value is "
        "10",
    ),
    (
        PretrainConfig,
        {"trainer.max_steps": 101},
        1,
        "trainer.max_steps = 101: must be at most the 100 steps of the curriculum; nearest legal value is 100, null "
        "runs them all",
    ),
    (
        ElasticConfig,
        {"curriculum.0.budget_weights": {"smal": 1}},
        1,
        "curriculum.0.budget_weights.smal = 1.0: is not a budget of elastic.budgets (full, small); nearest legal name "
        "is small",
    ),
    (
        ElasticConfig,
        {"curriculum.0.budget_weights": {"full": 0}},
        1,
        'curriculum.0.budget_weights = {"full": 0.0}: at least one weight must be above 0; write {} for uniform',
    ),
    (
        ElasticConfig,
        {"curriculum.0.temperature": [0.1, 1.0]},
        1,
        "curriculum.0.temperature = [0.1, 1.0]: the Gumbel temperature must not rise; nearest legal value is "
        "[0.1, 0.1]",
    ),
    (
        ElasticConfig,
        {"curriculum.1.router_frozen": False},
        1,
        'curriculum.1.execution = "slice": a sliced forward gives the router no gradient, so it needs '
        "curriculum.1.router_frozen = true; nearest legal value is mask",
    ),
    # space, budgets, loss
    (
        ElasticConfig,
        {"elastic.space.ffn.choices": [256, 200, 196]},
        1,
        "elastic.space.ffn.choices = [256, 200, 196]: choice 196 must be a multiple of 8, nearest legal is 192; legal "
        "are the full width 256 first, then smaller multiples, for example [256, 192, 128]",
    ),
    (
        ElasticConfig,
        {"elastic.space.depth.choices": [3, 4, 5]},
        1,
        "elastic.space.depth.choices = [3, 4, 5]: the first choice is 3, it must be the full width 5; choices "
        "[3, 4, 5] must be strictly descending; legal are the full width 5 first, then smaller multiples, for example "
        "[5, 3, 2]",
    ),
    (
        ElasticConfig,
        {"elastic.space.lanes": 7},
        1,
        "model.ffn = 256: must be a multiple of elastic.space.lanes = 7; nearest legal value is 259",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1.target": 1000},
        1,
        "elastic.budgets.1.target = 1000.0: exactly one of target and ratio must be given; set "
        "elastic.budgets.1.target=null",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1.name": "full", "curriculum.0.budget_weights": {}},
        1,
        'elastic.budgets.1.name = "full": names must differ, this one stands 2 times; choose another, for example '
        "full_2",
    ),
    (
        ElasticConfig,
        {"elastic.router.draws_per_step": 3, "data.micro_batch": 2},
        2,
        "elastic.router.draws_per_step = 3: must divide the micro-batches of one replica and step, 2 in short, 2 in "
        "long; nearest legal value is 2, null follows them",
    ),
    (
        ElasticConfig,
        {"distill.kl_weight": 0},
        1,
        "distill.kl_weight = 0.0: distill.kl_weight and distill.cross_entropy_weight must not both be 0; nearest legal "
        "value is 1.0",
    ),
    (
        ElasticConfig,
        {"distill.num_chunks": 500},
        1,
        "distill.num_chunks = 500: must be at most the 256 tokens of the shortest micro-batch; nearest legal value is "
        "256",
    ),
    # what is taken out of a family
    (
        EvaluateConfig,
        {"subnets": [{"name": "a"}, {"name": "a", "hidden": 64}]},
        1,
        'subnets.1.name = "a": names must differ, this one stands 2 times; choose another, for example a_2',
    ),
    (
        ExtractConfig,
        {"export.hugging_face": False},
        1,
        "export.hugging_face = false: export.hugging_face and export.megatron must not both be false; nearest legal "
        "value is true",
    ),
)


@pytest.mark.parametrize(("kind", "changes", "num_processes", "line"), BAD, ids=[row[3].split(" = ")[0] for row in BAD])
def test_bad_config_gets_one_line_with_field_value_rule_and_remedy(
    kind: type, changes: dict[str, object], num_processes: int, line: str
) -> None:
    assert problems_of(kind, changes, Cluster(num_processes)) == [line]


def test_unreachable_budget_names_the_nearest_reachable_target() -> None:
    (line,) = problems_of(ElasticConfig, {"elastic.budgets.1.ratio": 0.01}, Cluster())
    assert line.startswith("elastic.budgets.1.ratio = 0.01: target ")
    nearest = int(line.rpartition(" ")[2].replace(",", ""))
    # The remedy really is legal, and nothing below it is.
    absolute = {"elastic.budgets.1": {"name": "small", "target": nearest}}
    load_and_check(ElasticConfig, values_of(ElasticConfig, absolute), Cluster())
    absolute["elastic.budgets.1"]["target"] = nearest * 0.99
    assert problems_of(ElasticConfig, absolute, Cluster())


def test_all_problems_come_in_one_error() -> None:
    changes: dict[str, object] = {
        "trainr": {},
        "model.mamba_heads": 9,
        "data.micro_batch": 0,
        "optim.adam_beta1": 2,
        "elastic.router.hidden_width": "wide",
        "distill.kl_weight": 0,
        "parallel.sequence": True,
    }
    lines = problems_of(ElasticConfig, changes, Cluster())
    assert sorted(line.partition(" = ")[0] for line in lines) == sorted(
        [
            "trainr",
            "model.mamba_heads",
            "data.micro_batch",
            "optim.adam_beta1",
            "elastic.router.hidden_width",
            "distill.kl_weight",
            "parallel.sequence",
        ]
    )


def test_entries_of_a_list_are_all_reported() -> None:
    lines = problems_of(ElasticConfig, {"elastic.space.ffn.choices": [256, -8, "x"]}, Cluster())
    assert [line.partition(":")[0] for line in lines] == [
        "elastic.space.ffn.choices.1 = -8",
        'elastic.space.ffn.choices.2 = "x"',
    ]


def test_one_mistake_is_not_reported_twice() -> None:
    """A rule between sections stays silent while one of them is already known to be wrong."""
    lines = problems_of(ElasticConfig, {"model.ffn": "big"}, Cluster())
    assert lines == ['model.ffn = "big": must be a whole number; the default is 256']


@pytest.mark.parametrize("kind", VERBS)
def test_pitfall_14_default_config_is_legal(kind: type) -> None:
    check(kind(), Cluster())
    load_and_check(kind, values_of(kind, {}), Cluster())


def test_pitfall_25_full_budget_may_be_left_out() -> None:
    changes = {"elastic.budgets": [{"name": "small", "ratio": 0.7}], "curriculum.0.budget_weights": {"small": 1}}
    config = load_and_check(ElasticConfig, values_of(ElasticConfig, changes), Cluster())
    assert [budget.name for budget in config.budgets()] == ["small"]


def test_pitfall_10_ratio_and_target_are_two_fields() -> None:
    """The full budget as a share of 1 is the parent's own cost, in the units of its metric."""
    metrics = [{"name": str(metric), "metric": str(metric), "ratio": 1.0} for metric in Metric]
    changes = {"elastic.budgets": metrics, "curriculum.0.budget_weights": {}}
    config = load_and_check(ElasticConfig, values_of(ElasticConfig, changes), Cluster())
    full = shape_cost(config.parent_shape(), config.deployment())
    assert [budget.target for budget in config.budgets()] == [full[metric] for metric in Metric]


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
    phase = PhaseConfig(name="a", sequence_length=8, global_batch=4, tokens=65)
    assert phase.num_steps == 3
    assert total_steps((phase, PhaseConfig(name="b", steps=5)), None) == 8
    assert total_steps((phase, PhaseConfig(name="b", steps=5)), 4) == 4


def test_null_vocabulary_is_padded_for_every_tensor_parallel_size() -> None:
    config = with_vocab(PretrainConfig(model=ModelConfig(vocab_multiple=128)), 2047)
    assert config.parent_shape().vocab == 2048
    assert with_vocab(config, 9999) is config
    with pytest.raises(ValueError, match=r"model\.vocab"):
        PretrainConfig().parent_shape()


def test_space_section_names_every_axis() -> None:
    changes = {f"elastic.space.{axis}": {"choices": [full, full - 8]} for axis, full in _full_widths().items()}
    config = load(ElasticConfig, values_of(ElasticConfig, changes))
    assert {axis: choices.choices for axis, choices in config.elastic.space.axes().items()} == {
        Axis(axis): (full, full - 8) for axis, full in _full_widths().items()
    }


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
    phase, router = ElasticPhaseConfig(name="a", steps=1), RouterConfig()
    assert (phase.temperature, phase.logit_scale, phase.router_lr.peak) == ((1.0, 0.05), (1.0, 10.0), 1e-2)
    assert (router.hidden_width, router.budget_loss_weight) == (256, 1.0)
    assert BudgetConfig(name="b", ratio=0.5).metric is Metric.PARAMS


def run_values(kind: type, folder: Path) -> dict[str, Any]:
    """Return a legal config of a verb whose run folder, folder/name/version_0, is in use already."""
    run = folder / "name" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    changes: dict[str, object] = {
        "exp_manager.exp_dir": str(folder),
        "exp_manager.name": "name",
        "data.path": str(folder),
    }
    return values_of(kind, changes | ({"model.vocab": 512} if kind is PretrainConfig else {}))


def written_record(folder: Path, kind: str = "permuted_parent", mamba_groups: int = 2) -> str:
    """Make `folder` look like a checkpoint with 8 lanes."""
    folder.mkdir()
    Record(kind, ModelConfig(vocab=512, mamba_groups=mamba_groups).shape(), lanes=8).write(folder)
    return str(folder)


def test_inputs_that_do_not_exist_and_a_run_folder_in_use_are_named(tmp_path: Path) -> None:
    values = run_values(EvaluateConfig, tmp_path)
    put(values, "init_from.checkpoint", str(tmp_path / "a" / "b"))
    with pytest.raises(ConfigError) as caught:
        load_run(EvaluateConfig, values, Cluster(), is_main=True)
    missing, in_use = caught.value.problems
    assert (missing.field, missing.value) == ("init_from.checkpoint", str(tmp_path / "a" / "b"))
    assert missing.remedy.endswith(str(tmp_path))
    assert (in_use.field, in_use.value) == ("exp_manager.version", "version_0")
    assert "nearest free name is version_1" in in_use.remedy and "overwrite=true" in in_use.remedy
    # Another rank may look after the main process has made the folder: it must not take it for somebody else's.
    put(values, "init_from.checkpoint", written_record(tmp_path / "checkpoint"))
    load_run(EvaluateConfig, values, Cluster(), is_main=False)
    put(values, "exp_manager.overwrite", True)
    load_run(EvaluateConfig, values, Cluster(), is_main=True)


def test_checkpoint_that_is_none_or_does_not_split_over_the_ranks_is_named(tmp_path: Path) -> None:
    values = values_of(ImportanceConfig, {"data.path": str(tmp_path), "init_from.parent": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"init_from\.parent = .* is neither a checkpoint nor a run folder"):
        load_run(ImportanceConfig, values, Cluster(), is_main=False)
    put(values, "init_from.parent", written_record(tmp_path / "parent", mamba_groups=4))
    put(values, "parallel.tensor", 4)
    put(values, "lanes", 12)
    with pytest.raises(ConfigError) as caught:
        load_run(ImportanceConfig, values, Cluster(4), is_main=False)
    assert [str(problem) for problem in caught.value.problems] == [
        "lanes = 12: must divide the parent's FFN width = 256; nearest legal value is 8",
        "parallel.tensor = 4: must divide model.kv_heads = 2; nearest legal value is 2",
    ]


def test_family_needs_a_parent_permuted_for_its_lanes(tmp_path: Path) -> None:
    folders = {"data.path": str(tmp_path), "exp_manager.exp_dir": str(tmp_path)}
    values = values_of(ElasticConfig, folders)
    put(values, "init_from.permuted_parent", written_record(tmp_path / "raw", "parent"))
    with pytest.raises(
        ConfigError, match=r"permuted_parent = .*holds a parent, .* give what recipes/estimate_importance"
    ):
        load_run(ElasticConfig, values, Cluster(), is_main=True)
    put(values, "init_from.permuted_parent", written_record(tmp_path / "permuted"))
    load_run(ElasticConfig, values, Cluster(), is_main=True)
    put(values, "elastic.space.lanes", 4)
    with pytest.raises(ConfigError, match=r"elastic\.space\.lanes = 4: .*; nearest legal value is 8"):
        load_run(ElasticConfig, values, Cluster(), is_main=True)


def test_curriculum_reaches_the_loop_in_the_order_of_the_budgets() -> None:
    changes = {"curriculum.0.budget_weights": {"small": 2}, "curriculum.0.lr": {"peak": 3.0, "min": 1.0}}
    changes["curriculum.0.lr"] |= {"warmup_steps": 2, "schedule": "cosine"}
    config = load_and_check(ElasticConfig, values_of(ElasticConfig, changes), Cluster())
    short, long = config.curriculum_phases().phases
    assert (short.budget_weights, long.budget_weights) == ((0.0, 2.0), (1.0, 1.0))
    assert (short.execution, long.execution) == (Execution.MASK, Execution.SLICE)
    assert (short.router_frozen, long.router_frozen) == (False, True)
    assert [short.learning_rate.at(step, short.num_steps) for step in (0, 1, 2, 9)] == [1.5, 3.0, 3.0, 1.0]
    assert (short.temperature.at(1.0), short.logit_scale.at(1.0)) == pytest.approx((0.05, 10.0))
    assert config.curriculum_phases().total_steps == total_steps(config.curriculum, None)
    (pretrain,) = PretrainConfig().curriculum_phases().phases
    assert (pretrain.num_steps, pretrain.budget_weights) == (100, ())


def test_a_training_run_may_go_on_in_its_folder(tmp_path: Path) -> None:
    values = run_values(PretrainConfig, tmp_path)
    load_run(PretrainConfig, values, Cluster(), is_main=True)
    put(values, "exp_manager.resume_if_exists", False)
    with pytest.raises(ConfigError, match="resume_if_exists=true"):
        load_run(PretrainConfig, values, Cluster(), is_main=True)


def test_data_folder_without_manifest_is_named_when_the_vocabulary_depends_on_it(tmp_path: Path) -> None:
    values = values_of(PretrainConfig, {"data.path": str(tmp_path), "exp_manager.exp_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"model\.vocab = null: .*not a prepared data folder.*set model\.vocab"):
        load_run(PretrainConfig, values, Cluster(), is_main=True)


def test_prepare_data_rules_come_in_the_same_form(tmp_path: Path) -> None:
    values = {"validation_ratio": 0.9, "vocab_size": 0, "output_dir": str(tmp_path / "data")}
    with pytest.raises(ConfigError) as caught:
        load_run(PrepareConfig, values, Cluster(), is_main=True)
    assert [problem.field for problem in caught.value.problems] == ["validation_ratio", "vocab_size"]
    assert "must be within 0 and 0.5; nearest legal 0.5" in str(caught.value)


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
    rules = {"config_rules.py", "config_rules_layout.py", "config_rules_elastic.py", "config_load.py"}
    read = {
        node.attr
        for folder in ("elastic", "recipes")
        for file in (ROOT / folder).rglob("*.py")
        if file.name not in rules
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = {f"{owner}.{name}" for kind in VERBS for owner, name in config_fields(kind) if name not in read}
    assert unread == set()
