"""Sizes between the budgets of a tiny family: found, the same again, taken by the other verbs, and trained further."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import load_router
from elastic.config.load import ConfigError, config_dict, load
from elastic.config.rules_layout import Cluster
from elastic.config.verbs import ElasticConfig, EvaluateConfig, ExtractConfig, SearchConfig
from elastic.data.held_out import HeldOut
from elastic.router.decide import likeliest
from elastic.router.router import Router
from elastic.space.gates import Gates
from elastic.train.pipeline import PipelineRunner
from elastic.verbs.evaluate import run_evaluate
from elastic.verbs.extract import run_extract
from elastic.verbs.inputs import load_run
from elastic.verbs.members import subnet_summary
from elastic.verbs.search import run_search
from tests.distributed.harness import run_distributed
from tests.distributed.training import BUDGETS, CURRICULUM, ROUTER, SPACE, elastic_values, place, tiny_run_space, train
from tests.shapes import random_table

SHORT = [dict(CURRICULUM[0], steps=2), dict(CURRICULUM[1], steps=1)]
FILES = ("search.json", "subnets.json", "front.png")


def kept_layers(runner: PipelineRunner, gates: Gates, data: HeldOut) -> float:
    """Score a subnet by its layers: a score of a user's own."""
    assert gates.subnet is not None and len(data) and runner.student_model.decoder is not None
    return -float(len(gates.subnet.kept_layers))


def values_of(start, version, **more):
    source = dict(checkpoint=str(start / "run" / "searched"))
    values = dict(
        init_from=source, data=dict(path=str(start / "data"), validation_sequences=2, micro_batch=2),
        sequence_length=32, exp_manager=place(start, version), num_priced=2000, num_scored=4,
    )  # fmt: skip
    return values | more


def searched(values):
    screen = io.StringIO()
    folder = run_search(load_run(SearchConfig, values, Cluster(), is_main=True), Console(file=screen, width=200))
    return {name: (folder / name).read_bytes() for name in FILES}, screen.getvalue()


def _evaluated(values):
    run_evaluate(load_run(EvaluateConfig, values, Cluster(), is_main=True), Console(quiet=True))


def _extracted(values):
    run_extract(load_run(ExtractConfig, values, Cluster(), is_main=True), Console(quiet=True))


@pytest.fixture(scope="module")
def found(start):
    """Return what a search leaves of a family that has trained for three steps, and what it says."""
    run_distributed(train, 1, elastic_values(start, "searched", curriculum=SHORT))
    ((files, screen),) = run_distributed(searched, 1, values_of(start, "search"))
    return files, screen


def test_a_search_finds_sizes_between_budgets_and_again_the_same(start, found):
    files, screen = found
    report = json.loads(files["search.json"])
    rows = {row["name"]: row for row in report["members"]}
    assert 300 < report["num_priced"] == report["num_met"] < 2000 and len(rows) == 6  # the tiny space has no more
    assert [name for name, row in rows.items() if row["origin"] == "trained"] == ["full", "half"]
    front = [row for row in reversed(report["members"]) if row["on_front"]]
    assert front and sorted(row["score"] for row in front) == [row["score"] for row in reversed(front)]
    for name, row in rows.items():
        assert name in screen and f"{row['score']:.4f}" in screen
        inside = rows["half"]["params"] <= row["params"] <= rows["full"]["params"]
        assert (row["above_line"] is not None) == inside
    above = [row["above_line"] for name, row in rows.items() if name[0] == "s" and row["above_line"] is not None]
    assert above and f"{len(above)} of them lie between trained budgets, {sum(above) / len(above):+.4f} from" in screen
    assert files["front.png"].startswith(b"\x89PNG")
    ((again, _),) = run_distributed(searched, 1, values_of(start, "search_again"))
    assert {name: again[name] == files[name] for name in FILES} == dict.fromkeys(FILES, True)
    with pytest.raises(ConfigError, match=r"exp_manager\.version = \"search\": the folder .* is not empty"):
        load_run(SearchConfig, values_of(start, "search"), Cluster(), is_main=True)


def test_a_size_that_was_found_is_evaluated_cut_out_and_reloaded(start, found):
    rows = {row["name"]: row for row in json.loads(found[0]["search.json"])["members"]}
    path = str(start / "run" / "search" / "subnets.json")
    given = dict(init_from=values_of(start, "")["init_from"], subnets=path, budget_names=["s02"])
    more = {name: value for name, value in values_of(start, "s02").items() if name in ("data", "sequence_length")}
    run_distributed(_evaluated, 1, dict(given, exp_manager=place(start, "s02"), **more))
    (member,) = json.loads((start / "run" / "s02" / "evaluation.json").read_text())["members"]
    for name in ("params", "subnet", "deploy_bytes"):
        assert member[name] == rows["s02"][name]
    assert member["loss"] == rows["s02"]["score"]
    run_distributed(_extracted, 1, dict(given, exp_manager=place(start, "s02_cut")))
    (row,) = json.loads((start / "run" / "s02_cut" / "extraction.json").read_text())["members"]
    assert (row["name"], row["params"]) == ("s02", rows["s02"]["params"]) and row["max_abs_logit_diff"] <= 1e-4


def test_constraints_and_a_score_of_ones_own(start, found):
    rows = {row["name"]: row for row in json.loads(found[0]["search.json"])["members"]}
    most = rows["full"]["flops_per_token"] * 0.8
    limits = f"flops_per_token<={most},params>={rows['half']['params']},latency_ms<=1e6"
    more = dict(constraint=limits, score=f"{__name__}.kept_layers", latency=str(start / "times.json"))
    table = random_table(tiny_run_space(), torch.Generator().manual_seed(0))
    (start / "times.json").write_text(json.dumps(config_dict(table)))
    given = [dict(name="s01", hidden=40), dict(name="all")]
    values = values_of(start, "own", num_priced=200, subnets=given, **more)
    ((files, screen),) = run_distributed(searched, 1, values)
    report = json.loads(files["search.json"])
    assert report["metric"] == "flops_per_token" and report["num_met"] < report["num_priced"] == 200
    origins = {row["name"]: row["origin"] for row in report["members"]}
    found = [entry["name"] for entry in json.loads(files["subnets.json"])["subnets"]]
    assert origins["s01"] == "given" and sorted(found) == ["s02", "s03", "s04", "s05"]  # s01 stays the user's
    for row in report["members"]:
        assert row["score"] == -len(row["subnet"]["kept_layers"]) and row["latency_ms"] > 0
        if row["origin"] not in ("trained", "given"):
            assert row["flops_per_token"] <= most and row["params"] >= rows["half"]["params"]
    assert "kept_layers" in screen and "latency_ms" in screen and "warning: latency was not measured on a" in screen
    assert "all is the subnet of full: scored once" in screen


ELSEWHERE = config_dict(random_table(tiny_run_space(), torch.Generator().manual_seed(0), length_tokens=64))
BAD = [
    (dict(constraint="params<=10"), r"constraint = .*: params<=10 is outside .*; nearest possible is params<="),
    (dict(constraint="loss<=2"), r"constraint = .*: loss is none of the metrics .*; nearest legal name is"),
    (
        dict(constraint="latency_ms<=9"),
        r"constraint = .*: the deployment .* nothing of latency_ms; .* set latency=FILE",
    ),
    (dict(latency=ELSEWHERE), r'latency = "there": the deployment is decode of 1 x 8,192 .* measure.lengths=\[8192\]'),
    (dict(num_scored=3000), r"num_scored = 3000: must be at most num_priced = 2000; nearest legal value is 2000"),
    (dict(score="nowhere.at_all"), r'score = "nowhere.at_all": cannot be imported .*; write package.module.function'),
    (dict(score=f"{__name__}.SHORT"), r"score = .*: is no function; name a function of"),
    (dict(score="math.sqrt"), r'score = "math.sqrt": takes other arguments \(too many positional arguments\); name a'),
    (dict(budget_names=[], subnets=[dict(name="x")]), r"budget_names = \[\]: a search lies between and around trained"),
]


@pytest.mark.parametrize(("changes", "line"), BAD)
def test_a_search_that_cannot_be_is_refused_before_anything_is_written(start, found, changes, line):
    with pytest.raises(ConfigError) as refused:
        load_run(SearchConfig, values_of(start, "refused", **changes), Cluster(), is_main=True)
    (problem,) = refused.value.problems
    assert re.match(line, str(problem)), str(problem)
    assert not (start / "run" / "refused").exists()


def going_on(start, version, found, **changes):
    """Return a run that goes on from the family with s02 as a budget more, in slices, its router frozen."""
    rows = {row["name"]: row for row in json.loads(found[0]["search.json"])["members"]}
    budgets = [*BUDGETS, dict(name="s02", target=rows["s02"]["params"])]
    phase = dict(CURRICULUM[1], lr=dict(peak=1e-6), sequence_length=32, steps=2, budget_weights=dict(s02=1, half=1))
    source = dict(family=str(start / "run" / "searched"), subnets=str(start / "run" / "search" / "subnets.json"))
    sections = dict(elastic=dict(space=SPACE, budgets=budgets, router=ROUTER), init_from=source, curriculum=[phase])
    values = elastic_values(start, version, **sections)
    for path, value in changes.items():
        values[path] = {**values[path], **value}
    return values


def _trained_further(values):
    """Train as the recipe does, at once and in two parts; return what the router chooses before and behind it.

    Beside it the family that the record names, and by files whether both ways end with the same bytes.
    """
    config = load_run(ElasticConfig, values, Cluster(), is_main=True)
    values = dict(values, init_from={**values["init_from"], "subnets": [vars(one) for one in config.init_from.subnets]})
    train(values)
    parts = dict(values, exp_manager=dict(values["exp_manager"], version="in_parts"))
    train(dict(parts, trainer=dict(values["trainer"], max_steps=1)))
    train(parts)
    whole, resumed = (resolve_checkpoint(load(ElasticConfig, one).exp_manager.run_dir) for one in (values, parts))
    same = {name: (whole / name).read_bytes() == (resumed / name).read_bytes()
            for name in ("__0_0.distcp", "router.safetensors")}  # fmt: skip
    chosen = []
    for source in (config.init_from.family, config.exp_manager.run_dir):
        checkpoint = resolve_checkpoint(source)
        record = Record.read(checkpoint)
        router = Router(record.space(), len(record.family.budgets), record.family.router_width)
        load_router(checkpoint, router)
        names = [budget.name for budget in record.family.budgets]
        chosen.append({name: subnet_summary(likeliest(router, record.space(), n)) for n, name in enumerate(names)})
    return chosen, Record.read(whole).provenance["family"], same


def test_a_family_goes_on_with_a_size_that_was_found_as_a_budget_more(start, found):
    rows = {row["name"]: row for row in json.loads(found[0]["search.json"])["members"]}
    values = going_on(start, "further", found)
    (((before, behind), family, same),) = run_distributed(_trained_further, 1, values)
    assert family == str(resolve_checkpoint(start / "run" / "searched"))
    assert same == dict.fromkeys(same, True) and len(same) == 2
    assert {name: behind[name] for name in before} == before
    assert behind["s02"] == rows["s02"]["subnet"]
    more = values_of(start, "further_loss", init_from=dict(checkpoint=str(start / "run" / "further")))
    more = {name: value for name, value in more.items() if not name.startswith("num_")}
    run_distributed(_evaluated, 1, dict(more, budget_names=["s02", "full"]))
    report = json.loads((start / "run" / "further_loss" / "evaluation.json").read_text())
    for row in report["members"]:  # moved, from where the family stood
        assert 0 < abs(row["loss"] - rows[row["name"]]["score"]) < 1e-3


REFUSED = [
    (
        dict(elastic=dict(budgets=[*BUDGETS, dict(name="s02", ratio=0.95)])),
        r"elastic\.budgets\.2\.target = .*: its subnet uses \d+ params",
    ),
    (
        dict(elastic=dict(budgets=[BUDGETS[0], dict(BUDGETS[1], tolerance=0.5)])),
        r"elastic\.budgets\.1 = \"half params \d+(\.\d+)? within 50%\": the family was trained for half params .* 1%",
    ),
    (dict(elastic=dict(router=dict(ROUTER, hidden_width=8))), r"elastic\.router\.hidden_width = 8: .* router has 16"),
    (
        dict(elastic=dict(space=dict(SPACE, hidden=dict(choices=[64, 32])))),
        r"elastic\.space\.hidden\.choices = \[64, 32\]: the family's router",
    ),
    (dict(init_from=dict(subnets=[dict(name="half", hidden=32)])), r"init_from\.subnets\.0\.name = .*: the family was"),
    (dict(init_from=dict(subnets=[dict(name="s02", hidden=40)])), r"init_from\.subnets\.0 = \"s02\": hidden width 40"),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED)
def test_a_budget_that_cannot_begin_so_is_refused_before(start, found, changes, line):
    with pytest.raises(ConfigError) as refused:
        load_run(ElasticConfig, going_on(start, "never", found, **changes), Cluster(), is_main=True)
    assert any(re.match(line, str(problem)) for problem in refused.value.problems), str(refused.value)


def test_a_parent_has_no_family_to_go_on_from(start, found):
    values = going_on(start, "never", found, init_from=dict(family=str(start / "run" / "permuted")))
    with pytest.raises(ConfigError, match=r"init_from\.family = .*: holds a permuted_parent, without a router"):
        load_run(ElasticConfig, values, Cluster(), is_main=True)
    assert load(ElasticConfig, elastic_values(start, "x")).init_from.family is None
