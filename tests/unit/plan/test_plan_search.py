"""Layouts: what the run's rules refuse, what fits and in which order; and the verb that prints it."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from elastic.config.load import ConfigError
from elastic.config.sections import ParallelConfig
from elastic.plan.phases import budget_samples, phase_plans
from elastic.plan.run_plan import run_plan, seconds_by_cause
from elastic.plan.search import chosen, largest_micro_batch, layout_name, layout_rule_problems, run_problems, search
from elastic.plan.timing import PASSES
from elastic.space.gates import Execution
from tests.unit.plan.test_plan import parallel, values


def test_rules_of_the_run_refuse_a_layout() -> None:
    config = values("plan")
    fields = {problem.field for problem in layout_rule_problems(config, parallel(config, tensor=3), 1)}
    assert "parallel.tensor" in fields
    (taught,) = run_problems(replace(config, distill=replace(config.distill, teacher="trained")))
    assert str(taught).startswith('distill.teacher = "trained": trains the whole model beside each student')
    for tensor, replicas in ((2, 256), (4, 128), (8, 64)):
        many_replicas = parallel(config, tensor=tensor, pipeline=1, context=1)
        assert config.cluster.num_gpus // many_replicas.model_size == replicas
        assert layout_rule_problems(config, many_replicas, 1) == [], "as many draws in a step at any number of replicas"


def test_search_ranks_what_fits_and_says_why_the_rest_is_out() -> None:
    budgets = ", ".join(f"{{name: {name}, ratio: {ratio}}}" for name, ratio in (("12b", 1), ("9b", 0.9), ("6b", 0.8)))
    arguments = ("cluster.num_gpus=16", "cluster.memory_gb=40", "plan.max_micro_batch=1", "elastic.space.depth=null")
    config = values("plan", *arguments, "model.pattern=M-M*-M-M-", f"elastic.budgets=[{budgets}]")
    found = search(config, budget_samples(config, config.space()))
    times = [one.seconds for one in found.fitting]
    assert times == sorted(times) and len(times) > 3
    assert all(one.peak_bytes <= config.cluster.budget_bytes for one in found.fitting)
    for number, one in enumerate(found.alone):
        assert one is not None and one.plans[number].time.total <= found.fitting[0].plans[number].time.total
    reasons = {one.rule: one for one in found.rejected}
    assert "memory" in reasons and "GB of" in reasons["memory"].reason
    assert layout_name(ParallelConfig(tensor=2, recompute="full"), 4) == "TP2 mb4 recompute"


def test_largest_micro_batch_is_the_last_that_fits() -> None:
    config = values("plan")
    plan = phase_plans(config, config.parallel, 1, budget_samples(config, config.space()))[1]
    most = largest_micro_batch(plan)
    fitting, too_large = (plan.changed(batch=batch).peak_bytes for batch in (most, most + 1))
    assert fitting <= config.cluster.budget_bytes < too_large


def test_verb_prints_and_returns_the_same() -> None:
    config = values("plan", "plan.search=false")
    console = Console(width=118, file=io.StringIO())
    report = run_plan(config, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    phase = report["chosen"]["phases"][1]
    assert f"{phase['step_seconds']['total']['all']:.1f} s" in text
    by_cause = {cause: found["all"] for cause, found in phase["step_seconds"].items()}
    assert by_cause.pop("total") == pytest.approx(sum(by_cause.values()))
    assert all(cause in text and f"{seconds:.2f}" in text for cause, seconds in by_cause.items())
    assert all(f"{name} = " in text and "assumed: " in figure["source"] for name, figure in report["figures"].items())
    assert f"{report['chosen']['days_at_mfu']:.1f} days" in text
    assert all(f"warning: {line}" in text.replace("\n", " ") for line in report["warnings"])
    assert "…" not in text


def test_verb_refuses_an_illegal_layout() -> None:
    config = values("plan", "parallel.tensor=16", "parallel.context=1")
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 16"):
        run_plan(config, Console(file=io.StringIO()))


def test_the_docs_show_what_the_plan_says() -> None:
    text = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    table = re.findall(r"^\| ([\d,]+) tokens, (mask|slice), stage (\d) \| (.*) \|$", text, re.MULTILINE)
    config = values("plan")
    samples = budget_samples(config, config.space())
    own = chosen(config, samples)
    assert len(table) == 3
    for tokens, execution, stage, cells in table:
        (plan,) = (one for one in own.plans if one.phase.sequence_length == int(tokens.replace(",", "")))
        assert plan.phase.execution == Execution(execution)
        memory = plan.memory(int(stage))
        columns = [
            *(memory.parameters, memory.gradients, memory.optimizer, memory.teacher, memory.teacher_hidden),
            *(memory.activations, max(memory.working_set, memory.logits), memory.total),
        ]
        assert cells.split(" | ") == [f"{amount / 1e9:.1f}" for amount in columns]
    seconds = re.search(r"The step is estimated at\s([\d.]+) s and ([\d.]+) s", text)
    assert seconds is not None
    assert list(seconds.groups()) == [f"{plan.time.total:.1f}" for plan in own.plans]
    causes = re.findall(r"^\| ([a-z]+) ((?:\| ?[\d.]* ?)+)\|$", text, re.MULTILINE)
    assert [name for name, _ in causes] == [*seconds_by_cause(own.plans[0].time), "total"]
    for name, cells in causes[:-1]:
        by_pass = seconds_by_cause(own.plans[0].time)[name]
        shown = [cell.strip() for cell in cells.split("|")[1:]]
        assert shown == [f"{by_pass[one]:.2f}" if by_pass.get(one) else "" for one in (*PASSES, "all")]
    one = re.search(r"longer: ([\d.]+) s and ([\d.]+) s .*, ([\d.]+) s and ([\d.]+) s with the best\n", text)
    assert one is not None
    both = (
        plan
        for layout in (
            dict(tensor=2, pipeline=2, context=4, recompute="full"),
            dict(tensor=4, pipeline=2, recompute="selective"),
        )
        for plan in phase_plans(config, ParallelConfig(sequence=True, **layout), 1, samples)
    )
    assert list(one.groups()) == [f"{plan.time.total:.1f}" for plan in both]
    spare = 1 - own.peak_bytes / 1e9 / 80.0 - config.cluster.reserved_gb / 80.0
    assert f"{spare:.0%} of 80 GB is to spare" in text
