"""The config of recipes/evaluate_tasks.py and the rules between its fields."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from elastic.config.inputs import ServedInput, SubnetConfig
from elastic.config.load import Problem, Problems
from elastic.config.sections import ParallelConfig
from elastic.config.verbs import RunConfig
from elastic.space import ranges
from elastic.space.ranges import Required

INSTALL = 'pip install "lm-eval>=0.4.13" accelerate peft, or this project with its extra [eval]'


@dataclass(frozen=True, kw_only=True)
class EvaluateTasksConfig(RunConfig):
    """recipes/evaluate_tasks.py: what lm-eval's tasks say of budgets and subnets, or of an exported `folder`.

    `tasks` are names of lm-eval's own or of YAML files under `include_path`. `tokenizer` null takes the folder's own,
    or that of the data the checkpoint was trained on; `max_length` null what the export says. `limit` asks only so many
    questions of each task, `num_fewshot` null shows as many answers as the task wants. The table and the picture show
    the time that the family's table of latency gives, or what `latency_ms` says of a member by name.
    """

    init_from: ServedInput = field(default_factory=ServedInput)
    folder: str | None = None
    tokenizer: str | None = None
    budget_names: tuple[str, ...] | None = None
    subnets: tuple[SubnetConfig, ...] = ()
    tasks: Annotated[tuple[str, ...], Required("names of tasks, as in tasks=[arc_easy]")] = ()
    include_path: str | None = None
    num_fewshot: Annotated[int, ranges.Range(0, 1000)] | None = None
    limit: Annotated[int, ranges.Range(1, 2**31)] | None = None
    chat_template: bool = False
    batch_size: ranges.Size = 8
    max_length: ranges.Length | None = None
    latency_ms: Mapping[str, Annotated[float, ranges.Range(0, 1e9, open_low=True)]] = field(default_factory=dict)


def check_tasks_package(tasks: tuple[str, ...]) -> Problems:
    """lm-eval is there; it comes with an extra."""
    if importlib.util.find_spec("lm_eval") is None:
        yield Problem("tasks", list(tasks), "the package lm-eval is not installed", INSTALL)


def check_tasks_source(
    folder: str | None,
    budget_names: tuple[str, ...] | None,
    subnets: tuple[SubnetConfig, ...],
    parallel: ParallelConfig,
) -> Problems:
    """An exported folder is one model without budgets, which lm-eval runs."""
    if folder is not None:
        for name, given in {"budget_names": budget_names, "subnets": [subnet.name for subnet in subnets]}.items():
            if given:
                rule = "names parts of a nested checkpoint, and folder holds one model"
                yield Problem(name, list(given), rule, f"leave {name} out, or give init_from.checkpoint")
        if parallel.tensor > 1:
            rule = "lm-eval's own hf runs a folder, in one process"
            yield Problem("parallel.tensor", parallel.tensor, rule, "nearest legal value is 1")
