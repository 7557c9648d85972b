"""A table of times in a config: read once, judged with it, never trusted beyond what it holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elastic.checkpoint.record import Family, Record
from elastic.checkpoint.state import TrainingState
from elastic.config.latency import LatencyConfig, latency_notes, with_table
from elastic.config.load import config_dict, load
from elastic.config.rules_layout import Cluster
from elastic.config.verbs import CostConfig, ElasticConfig
from elastic.hf.card import CardInfo, model_card
from elastic.hf.export_settings import DtypeRule, ExportSettings
from elastic.run.changes import differences
from elastic.space.cost import subnet_cost
from elastic.space.latency import Check, LatencyTable, Machine
from elastic.space.reach import sample_subnet
from elastic.verbs.going_on import start_problems
from elastic.verbs.measure_latency import MeasureError, run_measure_latency
from tests.shapes import random_table
from tests.unit.config.configs import FAMILY, found, legal, put, values_of

BUDGETS = [
    {"name": "full", "metric": "latency_ms", "ratio": 1.0},
    {"name": "fast", "metric": "latency_ms", "ratio": 0.7},
]
SIZES = {"model.vocab": 512} | {path: value for path, value in FAMILY.items() if path.startswith("elastic.space")}


def config(table: LatencyTable | None, **changes: object) -> dict[str, Any]:
    """Return values of the verb cost with a table in them, and some paths changed."""
    values = values_of(CostConfig, SIZES | {"elastic.budgets": BUDGETS})
    put(values, "elastic.deployment.latency", None if table is None else config_dict(table))
    for path, value in changes.items():
        put(values, path.replace("__", "."), value)
    return values


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    space = legal(CostConfig, values_of(CostConfig, SIZES)).space()
    return random_table(space, torch.Generator().manual_seed(0))


def test_a_table_survives_its_file_and_the_config(table: LatencyTable, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(config_dict(table)))
    assert load(LatencyTable, json.loads(file.read_text())) == table
    values, problems = with_table(CostConfig, config(None, elastic__deployment__latency=str(file)))
    assert problems == ()
    read = legal(CostConfig, values)
    assert read.elastic.deployment.latency == table
    assert all(budget.limit > 0 for budget in read.budgets())
    again = config_dict(read)  # a resolved config holds the table, and needs the file no more
    assert load(CostConfig, again).elastic.deployment.latency == table
    values, _ = with_table(LatencyConfig, config(None, elastic__deployment__latency="nowhere"))
    measuring, (beside,) = found(LatencyConfig, values, Cluster(num_processes=2))
    assert str(beside).startswith("number of processes = 2: others beside it would slow down what is timed")
    assert measuring.elastic.deployment.latency is None and [b.name for b in measuring.elastic.budgets] == ["full"]


def test_exports_are_timed_beside_a_table_that_is_theirs(table: LatencyTable, tmp_path: Path) -> None:
    file, quiet = tmp_path / "table.json", Console(quiet=True)
    file.write_text(json.dumps(config_dict(table)))
    for latency, line in ((None, "needs a table; set elastic.deployment.latency=FILE"), (str(file), "is not a folder")):
        values, _ = with_table(
            LatencyConfig, config(None, elastic__deployment__latency=latency, measure={"folders": ["nowhere"]})
        )
        with pytest.raises(MeasureError, match=line):
            run_measure_latency(legal(LatencyConfig, values), quiet)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not JSON"),
        ("[1]", "is no table of times"),
        ('{"machine": 1}', "is no table of times"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: str | None, rule: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    if content is not None:
        file.write_text(content)
    values, (problem,) = with_table(CostConfig, config(None, elastic__deployment__latency=str(file)))
    assert problem.field == "elastic.deployment.latency" and problem.rule.startswith(rule)
    assert "recipes/measure_latency.py" in problem.remedy and values["elastic"]["deployment"]["latency"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elastic__deployment__latency": None},
         'elastic.budgets.0.metric = "latency_ms": needs measured times, and elastic.deployment.latency is null'),
        ({"model__vocab": 640}, "the table was measured with vocab = 512, the parent has 640"),
        ({"elastic__deployment__length_tokens": 4096},
         "the deployment is decode of 1 x 4,096 tokens, and the table holds decode of 1 x 8,192 tokens, prefill of "
         "1 x 8,192 tokens; nearest legal is elastic.deployment.length_tokens=8192"),
        ({"elastic__deployment__batch": 2}, "nearest legal is elastic.deployment.batch=1"),
        ({"elastic__space__ffn": {"choices": [256, 64], "per_layer": True}},
         "elastic.space.ffn = [64, 256]: times were measured for widths of 128 to 256, and 64 may be chosen"),
        ({"elastic__budgets": [{"name": "fast", "metric": "tokens_per_s", "ratio": 0.5}]},
         "elastic.budgets.0.ratio = 0.5: every smaller model is faster"),
        ({"elastic__budgets": [{"name": "fast", "metric": "latency_ms", "target": 1e-4}]},
         "target 0.0001 latency_ms lies outside what the choices can reach"),
        ({"elastic__budgets": [{"name": "fast", "metric": "tokens_per_s", "target": 0.01}]},
         "elastic.budgets.0.target = 0.01: target 0.01 tokens_per_s lies outside what the choices can reach"),
    ],
)  # fmt: skip
def test_what_a_table_does_not_cover_is_refused(table: LatencyTable, changes: dict[str, Any], message: str) -> None:
    _, problems = found(CostConfig, config(table, **changes))
    assert len(problems) >= 1 and any(message in str(problem) for problem in problems), list(map(str, problems))


def test_a_run_that_goes_on_with_times_measured_again_has_one_difference(table: LatencyTable) -> None:
    again = replace(table, checks=(Check("parent", "decode of 1 x 8,192 tokens", 1.0, 1.0),))
    configs = []
    for one in (table, again):
        values = values_of(ElasticConfig, SIZES | {"elastic.budgets": BUDGETS})
        put(values, "elastic.deployment.latency", config_dict(one))
        configs.append(load(ElasticConfig, values))
    then, space = configs[0], configs[0].space()
    family = Family(space.axes, then.budgets(), then.elastic.deployment, then.elastic.router.hidden_width)
    record, origin = Record("elastic", space.parent, 8, family=family), {"inputs": {}, "replicas": 1}
    state = TrainingState(3, 1234, config_dict(then), origin)
    for now, fields in zip(configs, ([], ["elastic.deployment.latency"]), strict=True):
        different = list(differences(state, record, now, record, origin))
        assert [one.field for one in different] == fields and all(one.acceptable for one in different)


def test_a_start_that_misses_its_rate_is_told_the_rate(table: LatencyTable) -> None:
    read = legal(CostConfig, config(table))
    rate = 1e3 / (0.7 * read.budgets()[0].limit)
    budgets = [BUDGETS[0], {"name": "fast", "metric": "tokens_per_s", "target": rate}]
    start = config(table, elastic__budgets=budgets, init_from__subnets=[{"name": "fast"}])  # all full
    (problem,) = start_problems(legal(CostConfig, start), Record("permuted_parent", read.space().parent, 8))
    assert (problem.field, problem.value) == ("elastic.budgets.1.target", rate)
    assert f"uses {0.7 * rate:.10g}" in problem.rule and "tokens_per_s" in problem.rule
    assert f"target={0.7 * rate:.10g}" in problem.remedy


def test_a_checkpoint_and_a_card_carry_the_times(table: LatencyTable, tmp_path: Path) -> None:
    read = legal(CostConfig, config(table))
    space, deployment, (_, budget) = read.space(), read.elastic.deployment, read.budgets()
    record = Record("elastic", space.parent, 8, family=Family(space.axes, read.budgets(), deployment, 16))
    record.write(tmp_path)
    assert Record.read(tmp_path).family == record.family
    subnet = sample_subnet(space, budget, deployment).subnet
    used = subnet_cost(space.parent, subnet, deployment).latency_ms
    info = CardInfo("test", space.parent, subnet, budget, deployment)
    card = model_card(info, subnet.shape(space.parent), ExportSettings(DtypeRule(torch.float32)), "checked", 0)
    assert f"| budget fast | {budget.limit:,.4g} latency_ms, used {used / budget.limit:.1%} |" in card
    assert f"| decode (batch 1, 8192 tokens), by times of layers on a device | {used:.4g} ms, " in card


def test_what_is_only_doubtful_is_said(table: LatencyTable) -> None:
    read = legal(CostConfig, config(table, elastic__space__ffn={"choices": [256, 200, 128], "per_layer": True}))
    deployment, space = read.elastic.deployment, read.space()
    here = replace(table.machine, device="another device", name="here")
    where, machine, between = latency_notes(deployment, space, here)
    assert where == (
        "latency: decode of 1 x 8,192 tokens in fp32 on a device (there), 1 threads, torch 2.0; rounds differ by up to "
        "2%"
    )
    assert machine.endswith("not measured on a machine like this one: here device another device, not a device")
    assert between.startswith("warning: ffn 200: not measured, interpolated")
    assert len(list(latency_notes(deployment, space, replace(table.machine, name="a twin")))) == 2
    off = Check("parent", "decode of 1 x 8,192 tokens", table_ms=1.0, clock_ms=1.2)
    checked = replace(table, checks=(off, replace(off, clock_ms=1.05), replace(off, conditions="other", clock_ms=9.0)))
    found_off = list(latency_notes(replace(deployment, latency=checked), space, table.machine))[1]
    assert found_off.startswith("warning: parent took 1 ms by its layers, 1.2 as a whole")
    near = replace(table, checks=(replace(off, clock_ms=1.05),))
    assert len(list(latency_notes(replace(deployment, latency=near), space, table.machine))) == 2
    assert list(latency_notes(replace(deployment, latency=None), space, here)) == []
    assert Machine.here().differences(Machine.here()) == [] and Machine.here().device
