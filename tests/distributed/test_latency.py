"""The verb measure_latency on this machine: a whole table of a small space, which cost then prices budgets by; and,
marked slow, a family that is trained to times, with its exports beside the clock."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elastic.config.latency import LatencyConfig
from elastic.config.load import load
from elastic.config.verbs import CostConfig, ElasticConfig, EvaluateConfig, ExtractConfig
from elastic.space.latency import LatencyTable
from elastic.verbs.cost import run_cost
from elastic.verbs.evaluate import EVALUATION_FILE, run_evaluate
from elastic.verbs.extract import run_extract
from elastic.verbs.inputs import load_run
from elastic.verbs.measure_latency import run_measure_latency
from elastic.verbs.training import run_training
from recipes._tiny_family import prepare_corpus
from tests.distributed.harness import run_distributed
from tests.distributed.training import CURRICULUM, elastic_values, place, train_start, write_corpus
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


def trained_to_a_time(folder: Path) -> tuple[list[dict[str, Any]], LatencyTable, dict[str, float]]:
    """Measure, train a family to times, extract it and time what was exported.

    Returns the members as evaluate found them, the table with the exports' checks, and the shares of the parent's time
    that the budgets ask for.
    """
    torch.set_num_threads(1)
    quiet, model = Console(quiet=True), SIZES | dict(
        pattern="M-M*-M-M-", vocab=320, hidden=256, ffn=1024, mamba_heads=16, head_channels=32, mamba_state=32,
        attention_heads=8, attention_channels=32,
    )  # fmt: skip
    space: dict[str, Any] = {  # one width for all MLPs: a Hugging Face folder fills narrower ones up
        "hidden": {"choices": [256, 224, 192, 160, 128]},
        "ffn": {"choices": [1024, 768, 512, 256]},
        "mamba_head": {"choices": [16, 12, 8]},
        "depth": {"choices": [9, 8, 7, 6]},
    }
    shares, table = {"full": 1.0, "fast": 0.75, "fastest": 0.55}, folder / "table.json"
    elastic: dict[str, Any] = {"space": space, "deployment": dict(batch=1, length_tokens=512, timed="prefill")}
    write_corpus(folder / "corpus")
    prepare_corpus(folder)
    train_start(folder, model, steps=2)
    measured = dict(model=model, elastic=elastic, output=str(table), measure=dict(whole=False))
    run_measure_latency(load_run(LatencyConfig, measured, ONE_PROCESS, is_main=True), quiet)
    timed = elastic | {"deployment": elastic["deployment"] | {"latency": str(table)}}
    budgets = [dict(name=name, metric="latency_ms", ratio=share) for name, share in shares.items()]
    router_lr = dict(peak=1e-2, warmup_steps=5)
    phases = [
        dict(CURRICULUM[0], steps=60, global_batch=6, router_lr=router_lr, logit_scale=(1.0, 10.0)),
        dict(CURRICULUM[1], steps=5, global_batch=6, budget_weights={}),
    ]
    run = elastic_values(
        folder, "timed", model=model, elastic=dict(timed, budgets=budgets, router={}), curriculum=phases
    )
    run_training(load_run(ElasticConfig, run, ONE_PROCESS, is_main=True), quiet)
    source = dict(init_from=dict(checkpoint=str(folder / "run" / "timed")))
    values = source | dict(exp_manager=place(folder, "loss"), data=dict(path=str(folder / "data")), sequence_length=32)
    members = json.loads((run_evaluate(load(EvaluateConfig, values), quiet) / EVALUATION_FILE).read_text())["members"]
    cut = run_extract(load(ExtractConfig, source | dict(exp_manager=place(folder, "cut"))), quiet)
    beside = dict(
        measured, elastic=timed, output=None, measure=dict(rounds=21, folders=[str(cut / name) for name in shares])
    )
    return members, run_measure_latency(load_run(LatencyConfig, beside, ONE_PROCESS, is_main=True), quiet), shares


@pytest.mark.slow
def test_a_family_trained_to_times_meets_them_by_the_table_and_by_the_clock(
    tmp_path: Path, record_property: Any
) -> None:
    """The clock's share of the parent's time is that of a processor that others use, too, so it is of one thread's own
    time, a median over rounds in which the parent takes turns; figures stand in the report (--junit-xml)."""
    ((members, table, shares),) = run_distributed(trained_to_a_time, 1, tmp_path, timeout_s=1400)
    parent, *exported = table.checks
    assert parent.name == "parent" and [Path(one.name).name for one in exported] == list(shares)
    for member, one in zip(members, exported, strict=True):
        asked = shares[member["name"]]
        record_property(member["name"], f"asked {asked}, clock {one.of_parent}, table {one.table_ms / parent.table_ms}")
        assert member["cost_ratio"] == pytest.approx(1.0, rel=0.03)
        assert one.table_ms == pytest.approx(member["latency_ms"])  # nothing was filled up
        assert one.of_parent == pytest.approx(asked, rel=0.1)
