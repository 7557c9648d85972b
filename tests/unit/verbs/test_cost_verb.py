"""The verb cost: needs no data and no weights, prints what the cost table says, and fits a terminal of 100 columns."""

import io
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from elastic.checkpoint.contents import write_contents
from elastic.checkpoint.record import Record
from elastic.config.load import ConfigError
from elastic.config.rules_layout import Cluster
from elastic.config.verbs import CostConfig
from elastic.space.cost import Deployment, Metric, subnet_cost
from elastic.space.shape import Subnet
from elastic.verbs.cost import quantity, run_cost
from elastic.verbs.inputs import load_run
from elastic.verbs.training import family_lines
from tests.unit.config.test_conf_files import compose_once
from tests.unit.config.test_published_run import NANO_4B

ROOT = Path(__file__).parents[3]


def config_of(name: str, *arguments: str) -> CostConfig:
    """Load a run's config as the recipe does on one CPU process, ??? and all."""
    values = OmegaConf.to_container(compose_once(name, arguments), resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return load_run(CostConfig, {str(key): value for key, value in values.items()}, Cluster(), is_main=True)


def printed(config: CostConfig) -> tuple[str, dict[str, Any]]:
    """Run the verb on a terminal of 100 columns; return what it printed and its report."""
    console = Console(width=100, file=io.StringIO())
    report = run_cost(config, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()), report


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("elastic_12b", ()),
        ("elastic_12b", ("budgets=nemotron_elastic_deploy_bf16",)),
        ("elastic_12b", ("budgets=nemotron_elastic_deploy_int4",)),
        ("elastic_9b", ()),
        ("elastic_9b", ("data.blend=[{path:elsewhere,weight:1}]",)),
        ("smoke_elastic", ("model.vocab=2048", "init_from.permuted_parent=null")),
    ],
)
def test_runs_and_siblings_are_priced_without_data_weights_or_gpus(name: str, arguments: tuple[str, ...]) -> None:
    text, report = printed(config_of(name, *arguments))
    assert "…" not in text and max(len(line) for line in text.splitlines()) <= 100
    for row in report["budgets"]:
        assert row["name"] in text and f"{row['cost_ratio']:.1%}" in text


def test_the_4b_is_priced_with_every_axis_full() -> None:
    axes = ("hidden", "ffn", "mamba_head", "mamba_channel", "attention_head", "depth")
    full = tuple(f"elastic.space.{axis}=null" for axis in axes)
    budget = "elastic.budgets=[{name: all, metric: params, target: null, ratio: 1.0}]"
    text, report = printed(config_of("elastic_9b", *NANO_4B, *full, budget))
    assert report["parent"] == report["smallest"] == report["router_start"]
    assert report["parent"]["params"] == 3_973_556_832 and "3.974B" in text
    assert "depth:" not in text


def test_report_says_what_the_cost_table_says() -> None:
    config = config_of("elastic_12b", "budgets=nemotron_elastic_deploy_fp8")
    _, report = printed(config)
    parent, deployment = config.model.shape(), Deployment(8, 32_768, 1, 1, 4, 2)
    assert report["parent"]["deploy_bytes"] == subnet_cost(parent, Subnet.full(parent), deployment).deploy_bytes
    for row, name in zip(report["budgets"], ("12b", "9b", "6b"), strict=True):
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in row["subnet"].items()}
        used = subnet_cost(parent, Subnet(**fields), deployment)
        assert (row["name"], row["metric"]) == (name, "deploy_bytes")
        assert (row["params"], row["deploy_bytes"]) == (used.params, used.deploy_bytes)
        assert row["cost_ratio"] == used.deploy_bytes / row["target"]
        assert report["smallest"]["params"] < row["params"]


def test_the_docs_show_what_the_command_prints() -> None:
    text, _ = printed(config_of("elastic_12b"))
    shown = [line.strip() for line in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8").splitlines()]
    assert [line for line in text.splitlines() if line.strip() not in shown] == []


def test_widths_that_kernels_dislike_are_named_with_the_smallest_number_of_ranks() -> None:
    text, report = printed(config_of("elastic_12b"))
    full, nine, _ = report["budgets"]
    assert full["kernel_warnings"] == {} and set(nine["kernel_warnings"]) == {4, 8}
    assert text.count("9b: in_proj rows = 20080 is not a multiple of 8 on each of 4 tensor-parallel ranks") == 1


def test_budget_that_no_subnet_comes_near_is_a_warning() -> None:
    coarse = ("elastic.space.hidden={choices: [5120, 3584], per_layer: false}",)
    rest = ("ffn", "mamba_head", "mamba_channel", "attention_head", "depth")
    coarse += tuple(f"elastic.space.{axis}=null" for axis in rest)
    budgets = "elastic.budgets=[{name: middle, metric: params, target: 10.5e9, ratio: null}]"
    text, report = printed(config_of("elastic_12b", *coarse, budgets))
    assert not report["budgets"][0]["is_near"]
    assert "warning: budget middle: no subnet found within 1% of the target" in text


@pytest.mark.parametrize(("kept", "is_said"), [("{attention: 1}", False), ("null", True)])
def test_members_that_stock_code_runs_without_a_cache_are_named_before_training(kept: str, is_said: bool) -> None:
    """By cost, of the member it samples, and by train, of the smallest depth; where attention stays, by none."""
    sizes = ("model.vocab=2048", "model.pattern=M-M-M-M-*", f"model.tied_embeddings={str(is_said).lower()}")
    depth = "elastic.space.depth={choices: [9, 4], per_layer: false}"
    budget = "elastic.budgets=[{name: small, metric: params, target: null, ratio: 0.25}]"
    rest = ("init_from.permuted_parent=null", f"elastic.space.keep_at_least={kept}")
    config = config_of("smoke_elastic", *sizes, depth, budget, *rest)
    text, report = printed(config)
    assert len(report["budgets"][0]["subnet"]["kept_layers"]) == 4
    assert ("small: it keeps no attention layer" in text) == is_said
    assert ("small: a Hugging Face folder stores" in text) == is_said  # a tied head's copy
    before = family_lines(config.space(), config.budgets())
    assert ("note: of a member at the smallest depth, it keeps no attention layer" in before) == is_said


def test_mamba_widths_that_differ_between_layers_cannot_be_exported() -> None:
    axes = ("hidden", "ffn", "mamba_channel", "attention_head", "depth")
    only_heads = tuple(f"elastic.space.{axis}=null" for axis in axes)
    heads = "elastic.space.mamba_head={choices: [128, 64], per_layer: true}"
    budget = "elastic.budgets=[{name: b, metric: params, target: 11.0e9, ratio: null}]"
    text, report = printed(config_of("elastic_12b", *only_heads, heads, budget))
    assert "64-128 x 80" in text and "none" in text
    assert "Mamba heads differ between layers" in report["budgets"][0]["kernel_warnings"][1][0]


def test_null_vocabulary_needs_data_or_a_number() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab = null: .*no data\.path is given; or set model\.vocab"):
        config_of("train_elastic", "budgets=halves", "model.hidden=128")
    with pytest.raises(ConfigError, match=r'data\.path = "not/there": does not exist'):
        config_of("train_elastic", "budgets=halves", "model.hidden=128", "data.path=not/there")
    known = config_of("train_elastic", "budgets=halves", "model.hidden=128", "data.path=not/there", "model.vocab=2048")
    assert known.model.shape().vocab == 2048


def test_nothing_is_priced_without_a_model() -> None:
    with pytest.raises(ConfigError, match=r"1 problem.*\s+model = null: missing.*set init_from"):
        config_of("train_elastic")


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("elastic.space.hiden=1", "elastic.space.hiden = 1: unknown key; did you mean elastic.space.hidden?"),
        ("trainer.max_stepz=1", "trainer.max_stepz = 1: unknown key; did you mean trainer.max_steps?"),
        ("elastic.space.lanes=7", "model.ffn = 20480: must be a multiple of elastic.space.lanes = 7"),
        ("init_from.permuted_parent=not/there", 'init_from.permuted_parent = "not/there": does not exist'),
        ("elastic.budgets.2.target=1e9", "elastic.budgets.2.target = 1000000000.0: target 1,000,000,000 params lies"),
    ],
)
def test_config_is_checked_like_that_of_the_run(argument: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("elastic_12b", argument)
    (line,) = (str(found) for found in caught.value.problems)
    assert line.startswith(problem)


def test_a_permuted_parent_says_which_layers_leave(tmp_path: Path) -> None:
    """The record alone is read; layers leave by its ranking, and another model or other lanes are refused."""
    config = config_of("elastic_12b")
    ranking = tuple(reversed(range(62)))
    parent = tmp_path / "permuted"
    parent.mkdir()
    Record("permuted_parent", config.model.shape(), 8, ranking).write(parent)
    write_contents(parent, {})
    text, report = printed(config_of("elastic_12b", f"init_from.permuted_parent={parent}"))
    assert "depth:" not in text and report["depth_ranking"] == list(ranking)
    for row in report["budgets"]:
        kept = row["subnet"]["kept_layers"]
        assert kept == list(range(62 - len(kept), 62))
    with pytest.raises(ConfigError, match=r"elastic\.space\.lanes = 16"):
        config_of("elastic_12b", f"init_from.permuted_parent={parent}", "elastic.space.lanes=16")
    with pytest.raises(ConfigError, match=r"model\.hidden = 4480: the checkpoint holds hidden = 5120"):
        printed(config_of("elastic_9b", f"init_from.permuted_parent={parent}"))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("params", 12_310_001_152, "12.310B"),
        ("params", 950, "950.000"),
        ("weight_bytes", 24_620_002_304, "22.93 GiB"),
        ("kv_bytes", 0, "0 B"),
        ("conv_bytes", 2_752_512, "2.625 MiB"),
        ("flops_per_token", 2.4e10, "24G"),
        ("flops_per_token", 8.4e6, "8.4M"),
    ],
)
def test_quantities_have_units(name: str, value: float, text: str) -> None:
    assert quantity(name, value) == text
    assert name in {metric.value for metric in Metric} | {"kv_bytes", "conv_bytes"}
