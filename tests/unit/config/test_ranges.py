"""Every number that a person can write has two limits, and no value of any field ends in anything but a Problem."""

import copy
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, make_dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch

from elastic.config.inputs import SubnetConfig
from elastic.config.load import config_dict, field_paths, load, load_with_problems, show
from elastic.config.rules import rule_problems
from elastic.config.rules_layout import Cluster, nearest_divisor
from elastic.config.verbs import (
    CostConfig,
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    GenerateConfig,
    PretrainConfig,
)
from elastic.corpus.config import PrepareConfig
from elastic.plan.config import PlanConfig
from elastic.space.axes import Axis
from elastic.space.cost import COUNTED, Deployment, Widths, cost, shape_cost
from elastic.space.ranges import MOST_LAYERS, Range
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, Space
from tests.unit.config.configs import INPUTS, VERBS, found, legal, put, values_of

KINDS = (*VERBS, PlanConfig)
INPUTS[PlanConfig] = INPUTS[CostConfig]
HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)
EXTREMES = (
    -1, 0, 1, 2**31, 2**63, 10**18, 10**400, -(10**400), 5e-324, 1e-40, 0.5, 1e15, 1e300, 1e308, -1e308, math.nan,
    math.inf, -math.inf, True, None, "", "x", "\n", [], {}, [1e308], [[]], {"x": 1e308}, HOLDS_ITSELF,
)  # fmt: skip


def numbers(hint: Any, path: str, limits: tuple[Range, ...] = ()) -> Iterator[tuple[str, Range | None]]:
    """List (path, limits) of every whole or real number in an annotation, sections and lists included."""
    if hint in (int, float):
        yield path, next(iter(limits), None)
    elif get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        yield from numbers(inner, path, tuple(extra for extra in extras if isinstance(extra, Range)))
    elif isinstance(hint, type) and is_dataclass(hint):
        for name, own in get_type_hints(hint, include_extras=True).items():
            yield from numbers(own, f"{path}.{name}")
    else:
        for argument in get_args(hint):
            yield from numbers(argument, path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_finite_lower_and_upper_limit(kind: type) -> None:
    found = dict(numbers(kind, kind.__name__))
    assert kind.__name__ in ("ExtractConfig", "ImportConfig") or len(found) > 4
    for path, limits in found.items():
        assert limits is not None and limits.low is not None and limits.high is not None, path
        assert -math.inf < limits.low < limits.high < math.inf, path


def paths_of(values: Any, prefix: str = "") -> Iterator[str]:
    """List the dotted path of everything in plain values."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        yield f"{prefix}{key}"
        yield from paths_of(value, f"{prefix}{key}.")


def test_any_value_in_any_field_is_a_problem_or_legal() -> None:
    """Hundreds of fields, ten values each: none raises anything else, and the message can be written."""
    subnet, seen, refused = config_dict(load(SubnetConfig, {"name": "mine", "ffn": [64], "kept_layers": [0]})), set(), 0
    for kind in sorted(KINDS, key=lambda kind: kind is not ElasticConfig):
        whole = config_dict(
            load(kind, values_of(kind, {"subnets": [subnet]} if "subnets" in field_paths(kind) else {}))
        )
        base, hints = load(kind, whole), get_type_hints(kind, include_extras=True)
        for path in set(paths_of(whole)) - seen:
            # Loaded alone: the other fields are what they were, and a rule that reads this one runs if it is legal.
            name = path.partition(".")[0]
            alone = make_dataclass("Alone", [(name, hints[name])], frozen=True)
            for value in EXTREMES[len(path) % 3 :: 3]:  # every third, another one from path to path
                changed = {name: copy.deepcopy(whole[name])}
                put(changed, path, value)
                loaded, problems = load_with_problems(alone, changed)
                if not problems:
                    problems = rule_problems(replace(base, **vars(loaded)), Cluster())
                refused += bool(problems)
                assert all(problem.rule and problem.remedy and str(problem) for problem in problems), path
        seen |= set(paths_of(whole))  # the verbs share most sections
    assert len(seen) > 250 and refused > 1000


def test_the_cost_table_holds_at_all_upper_limits_at_once() -> None:
    """The largest legal parent under the largest legal deployment: whole numbers below 2^63, expectations finite."""
    high = {path.rpartition(".")[2]: limits.high for path, limits in numbers(PretrainConfig, "") if limits is not None}
    names = get_type_hints(ModelShape).keys() & high.keys()
    sizes = {name: int(high[name] or 0) for name in names if name != "norm_epsilon"}
    parent = ModelShape.uniform("M-*" * (MOST_LAYERS // 3), **sizes)
    most = {field.name: limits.high for field in fields(Deployment)
            for path, limits in numbers(Deployment, "") if path == f".{field.name}" and limits is not None}  # fmt: skip
    deployment = load(Deployment, most)
    used = shape_cost(parent, deployment)
    assert used.flops_per_token < 2**63 and all(math.isfinite(float(used[metric])) for metric in COUNTED)
    for axis in (Axis.HIDDEN, Axis.FFN, Axis.MAMBA_CHANNEL, Axis.DEPTH):
        full = Space(parent, {}).full_width(axis)
        space = Space(parent, {axis: AxisChoices((full, full // 2))})
        chances = {axis: torch.full((1, 2), 0.5, dtype=torch.float64)}
        expected = cost(parent, Widths.expected(space, chances), deployment)
        assert math.isfinite(float(expected.flops_per_token)) and math.isfinite(float(expected.deploy_bytes))


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        (CostConfig, {"elastic.deployment.length_tokens": 1e308}, "elastic.deployment.length_tokens"),
        (CostConfig, {"elastic.deployment.batch": 1e20}, "elastic.deployment.batch"),
        (ElasticConfig, {"elastic.router.hidden_width": 1e13}, "elastic.router.hidden_width"),
        (GenerateConfig, {"max_new_tokens": 1e15}, "max_new_tokens"),
        (ElasticConfig, {"curriculum.0.lr.peak": 1e300}, "curriculum.0.lr.peak"),
        (ElasticConfig, {"curriculum.0.steps": 1e18}, "curriculum.0.steps"),
        (ElasticConfig, {"curriculum.1.tokens": 1e15}, "curriculum.1.tokens"),
        (PrepareConfig, {"vocab_size": 1e9}, "vocab_size"),
        (PretrainConfig, {"model.pattern": "M" * 2000}, "model.pattern"),
    ],
)
def test_values_that_ended_in_tracebacks(kind: type, changes: dict[str, object], field: str) -> None:
    _, problems = found(kind, values_of(kind, changes))
    assert field in {problem.field for problem in problems}


def test_numbers_are_taken_as_names() -> None:
    """The shell takes quotes away, so a name that looks like a number arrives as one."""
    changes = {"exp_manager.version": 1, "exp_manager.name": math.nan, "budget_names": [6, 12.5]}
    config = legal(EvaluateConfig, values_of(EvaluateConfig, changes))
    assert (config.exp_manager.version, config.exp_manager.name) == ("1", "nan")
    assert config.budget_names == ("6", "12.5")
    weights: dict[Any, int] = {6: 1}
    family = {"elastic.budgets": [{"name": 6, "ratio": 0.7}], "curriculum.0.budget_weights": weights}
    elastic = legal(ElasticConfig, values_of(ElasticConfig, family))
    assert elastic.budgets()[0].name == "6" and elastic.curriculum[0].weights(["6"]) == (1.0,)
    _, (problem,) = load_with_problems(EvaluateConfig, values_of(EvaluateConfig, {"exp_manager.name": True}))
    assert "true" in problem.remedy and problem.field == "exp_manager.name"


def test_no_kept_layer_is_no_subnet_and_no_member_is_no_work() -> None:
    for kind in (EvaluateConfig, ExtractConfig):
        wrong = {"budget_names": [], "subnets": []}
        _, (problem,) = found(kind, values_of(kind, wrong))
        assert str(problem).startswith("budget_names = []: names nothing")
        _, (problem,) = found(kind, values_of(kind, {"subnets": [{"name": "a", "kept_layers": []}]}))
        assert str(problem).startswith("subnets.0.kept_layers = []: must not be empty")
        legal(kind, values_of(kind, wrong | {"subnets": [{"name": "a"}]}))


def test_other_budgets_leave_the_weights_to_null() -> None:
    changes = {"elastic.budgets": [{"name": "half", "ratio": 0.7}], "curriculum.0.budget_weights": None}
    config = legal(ElasticConfig, values_of(ElasticConfig, changes))
    assert config.curriculum[0].weights(["half"]) == (1.0,)


def test_the_nearest_divisor_of_a_large_number_is_found_at_once() -> None:
    assert nearest_divisor(7, 2**40) == 8 and nearest_divisor(6, 2**40) == 4 and nearest_divisor(5, 1) == 1
    assert all(nearest_divisor(v, n) == min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - v), d))
               for n in range(1, 40) for v in range(1, 45))  # fmt: skip


def test_a_value_that_holds_itself_can_be_shown() -> None:
    assert show(HOLDS_ITSELF) == "[[...]]" and len(show(10**400)) == 60
