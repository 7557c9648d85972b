"""The verb measure_latency on this machine: a whole table of a small space, which cost then prices budgets by; and,
marked slow, a router that is trained to a time, with the submodel it chose beside the clock."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elastic.config.latency import LatencyConfig
from elastic.config.load import load
from elastic.config.verbs import CostConfig
from elastic.router.decide import likeliest
from elastic.router.draw import Chooser, RouterSettings
from elastic.router.phases import Curriculum, ElasticPhase, LearningRate
from elastic.router.router import Router
from elastic.space.cost import Budget, Deployment, Metric, subnet_cost
from elastic.space.latency import Check, LatencyTable
from elastic.verbs.cost import run_cost
from elastic.verbs.inputs import load_run
from elastic.verbs.measure_latency import Conditions, checks, run_measure_latency
from elastic.world.groups import Layout, world
from tests.distributed.harness import run_distributed
from tests.unit.config.configs import ONE_PROCESS

SIZES = dict(
    pattern="M-*-", vocab=64, hidden=32, ffn=64, mamba_heads=4, head_channels=8, mamba_groups=2, mamba_state=8,
    attention_heads=4, kv_heads=2, attention_channels=8,
)  # fmt: skip
SPACE: dict[str, Any] = {
    "hidden": {"choices": [32, 24]},
    "ffn": {"choices": [64, 32], "per_layer": True},
    "depth": {"choices": [4, 3]},
}


def measured_and_priced(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Measure a small space, then price budgets in time by the file; returns file, screen and report."""
    screen, file = Console(file=io.StringIO(), width=150), str(folder / "table.json")
    deployment = dict(batch=2, length_tokens=16)
    elastic: dict[str, Any] = dict(space=SPACE, deployment=deployment)
    values = dict(model=SIZES, elastic=elastic, output=file, measure=dict(rounds=3, lengths=[16, 8, 16]))
    run_measure_latency(load(LatencyConfig, values), screen)
    budgets = [dict(name="full", metric="latency_ms", ratio=1.0)]
    asked = dict(model=SIZES, elastic=elastic | {"budgets": budgets, "deployment": deployment | {"latency": file}})
    report = run_cost(load_run(CostConfig, asked, ONE_PROCESS, is_main=True), screen)
    assert isinstance(screen.file, io.StringIO)
    return json.loads(Path(file).read_text()), screen.file.getvalue(), report


def test_what_is_measured_prices_budgets(tmp_path: Path) -> None:
    ((content, screen, report),) = run_distributed(measured_and_priced, 1, tmp_path)
    table = load(LatencyTable, content)
    assert [one.conditions for one in table.measured] == [
        f"{timed} of 2 x {length} tokens" for timed in ("decode", "prefill") for length in (16, 8)
    ]
    for one in table.measured:
        assert {part: len(times) for part, times in one.layer_ms.items()} == dict(mamba=2, mlp=4, attention=2, rest=2)
        assert all(ms > 0 for times in one.layer_ms.values() for ms in times)
        assert {part: len(values) for part, values in one.spread.items()} == dict(mamba=2, mlp=4, attention=2, rest=2)
    assert [one.name for one in table.checks] == ["parent", "smallest"] * 4
    times, (at, *_) = table.measured[0].layer_ms, table.measured
    whole = times["mamba"][1] + 2 * times["mlp"][3] + times["attention"][1] + times["rest"][1]
    assert report["parent"]["latency_ms"] == pytest.approx(whole) == table.checks[0].table_ms
    assert report["parent"]["tokens_per_s"] == pytest.approx(2e3 / whole)
    assert report["budgets"][0]["target"] == pytest.approx(whole)
    assert f"latency: {at.conditions} in fp32 on {table.machine.device}" in screen and "tokens/s" in screen


def trained_to_a_time() -> tuple[list[tuple[float, float]], tuple[Check, ...]]:
    """Measure, train a router by its budget loss alone, and time what was chosen.

    Returns what the router's own argmax uses beside its target, and the subnets that are taken beside the clock.
    """
    sizes = SIZES | dict(
        pattern="M-M*-M-M-", vocab=512, hidden=256, ffn=1024, mamba_heads=16, head_channels=32, mamba_state=32,
        attention_heads=8, attention_channels=32,
    )  # fmt: skip
    space: dict[str, Any] = {
        "hidden": {"choices": [256, 224, 192, 160, 128]},
        "ffn": {"choices": [1024, 768, 512, 256], "per_layer": True},
        "mamba_head": {"choices": [16, 12, 8]},
        "depth": {"choices": [9, 8, 7, 6]},
    }
    deployment = dict(batch=1, length_tokens=256)
    values = dict(model=sizes, elastic=dict(space=space, deployment=deployment), measure=dict(whole=False))
    config = load(LatencyConfig, values)
    table = run_measure_latency(config, Console(quiet=True))
    where, conditions = config.space(), Deployment(**deployment, timed="prefill", latency=table)
    budgets = tuple(
        Budget(f"b{ratio}", Metric.LATENCY_MS, ratio=ratio).absolute(where.parent, conditions)
        for ratio in (1.0, 0.75, 0.55)
    )
    phase = ElasticPhase(name="alone", steps=400, router_lr=LearningRate(peak=1e-2, warmup_steps=10),
                         temperature=(1.0, 0.05), logit_scale=(1.0, 10.0))  # fmt: skip
    router = Router(where, len(budgets))
    source = Chooser(router, where, budgets, conditions, RouterSettings(), seed=0)
    optimizer = torch.optim.AdamW(router.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(phase.num_steps):
        moment = Curriculum((phase,)).at(step)
        optimizer.param_groups[0]["lr"] = moment.router_learning_rate
        optimizer.zero_grad()
        loss = source.draw(moment, 1, 0, 1).router_loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
    subnets = {budget.name: source.decide(index) for index, budget in enumerate(budgets)}
    by_itself = [likeliest(router, where, index) for index in range(len(budgets))]
    used = [float(subnet_cost(where.parent, subnet, conditions)[Metric.LATENCY_MS]) for subnet in by_itself]
    with world(Layout()), torch.no_grad():
        clocked = checks(table, where.parent, subnets, [Conditions("prefill", 1, 256)], 9)
    return list(zip(used, (budget.limit for budget in budgets), strict=True)), clocked


@pytest.mark.slow
def test_a_router_meets_a_time(record_property: Any) -> None:
    """Within 3% by the table; what the clock says of each submodel stands in the report of the tests (--junit-xml)."""
    ((found, clocked),) = run_distributed(trained_to_a_time, 1)
    for (used, target), one in zip(found, clocked, strict=True):
        record_property(one.name, f"clock {one.clock_ms:.4g} ms, table {one.table_ms:.4g} ms, target {target:.4g} ms")
        assert used == pytest.approx(target, rel=0.03) and one.table_ms == pytest.approx(target, rel=0.01)
