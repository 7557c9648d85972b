"""Subnets from a file: one reader for all verbs, which takes what is asked for by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from elastic.config.verbs import CostConfig, ElasticConfig, EvaluateConfig, ExtractConfig, GenerateConfig, ImportConfig
from elastic.space.shape import Subnet
from elastic.verbs.subnet_file import fill_subnets, write_subnets
from tests.unit.verbs.test_evaluate_mask import PARENT

NAMES = ("s01", "s02", "s03")


@pytest.fixture
def path(tmp_path: Path) -> str:
    write_subnets(tmp_path / "subnets.json", tmp_path, {name: Subnet.full(PARENT) for name in NAMES})
    return str(tmp_path / "subnets.json")


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


@pytest.mark.parametrize("kind", [EvaluateConfig, ExtractConfig])
def test_members_are_all_of_a_file_or_those_that_are_named(path: str, kind: type) -> None:
    filled, problems = fill_subnets(kind, {"subnets": path})
    assert not problems and names(filled["subnets"]) == list(NAMES) and "budget_names" not in filled
    assert filled["subnets"][0] == {"name": "s01", **json.loads(Path(path).read_text())["subnets"][0]}
    filled, _ = fill_subnets(kind, {"subnets": path, "budget_names": ["small", "s03"]})
    assert (names(filled["subnets"]), filled["budget_names"]) == (["s03"], ["small"])


def test_writers_and_budgets_to_train_take_what_bears_their_name(path: str) -> None:
    filled, _ = fill_subnets(GenerateConfig, {"subnets": path, "think": "s01", "answer": "full"})
    assert names(filled["subnets"]) == ["s01"] and filled["think"] == "s01"
    for kind in (ElasticConfig, CostConfig):
        values = {
            "init_from": {"subnets": path, "family": "run"},
            "elastic": {"budgets": [{"name": "full"}, {"name": "s02"}]},
        }
        filled, _ = fill_subnets(kind, values)
        assert names(filled["init_from"]["subnets"]) == ["s02"] and filled["init_from"]["family"] == "run"
    for budgets in (None, 5, "s02", ["s02"]):  # what a rule of the config names later
        filled, problems = fill_subnets(ElasticConfig, values | {"elastic": {"budgets": budgets}})
        assert (filled["init_from"]["subnets"], problems) == ([], ())
    lists = {"subnets": [{"name": "mine"}], "budget_names": ["small"]}
    assert fill_subnets(EvaluateConfig, lists) == (lists, ()) and fill_subnets(ImportConfig, {"subnets": "x"})[1] == ()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "subnets.json is missing from"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "holds no list of subnets with names"),
        ('{"subnets": [{"hidden": 3}]}', "holds no list of subnets with names"),
        ('{"subnets": {"a": 3}}', "holds no list of subnets with names"),
    ],
)
def test_a_file_that_holds_none_is_a_problem(tmp_path: Path, content: str | None, rule: str) -> None:
    path = tmp_path / "subnets.json"
    if content is not None:
        path.write_text(content)
    filled, (problem,) = fill_subnets(ExtractConfig, {"subnets": str(path)})
    assert filled["subnets"] == [] and problem.field == "subnets" and rule in problem.rule
