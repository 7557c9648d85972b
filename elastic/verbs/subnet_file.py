"""Subnets in a file, as recipes/search.py writes them: one reader for every verb that takes subnets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.config.load import Problem
from elastic.config.tasks import EvaluateTasksConfig
from elastic.config.verbs import ElasticRunConfig, GenerateConfig, MembersConfig
from elastic.hf.safe_files import UnsafeFileError, read_json
from elastic.space.shape import Subnet
from elastic.verbs.members import subnet_summary
from elastic.world.files import write_json

SUBNETS = "subnets"
LIMIT_BYTES = 16 << 20
REMEDY = "give a list, or the subnets.json of a run of recipes/search.py"


def write_subnets(path: Path, checkpoint: Path, subnets: Mapping[str, Subnet]) -> None:
    """Write subnets by name as entries of `subnets=[...]`, with the checkpoint they were found in."""
    entries = [{"name": name, **subnet_summary(subnet)} for name, subnet in subnets.items()]
    write_json(path, {"checkpoint": str(checkpoint), SUBNETS: entries})


def fill_subnets(kind: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Problem, ...]]:
    """Return the values with a file's entries in the place of its name (`subnets=FILE`), and what is wrong with it.

    Where a verb is asked for names, only those are taken: what `budget_names` lists, what writes, the budgets to train.
    """
    filled, of_family = dict(values), issubclass(kind, ElasticRunConfig)
    if of_family:
        section = filled.get("init_from")
        given = section.get(SUBNETS) if isinstance(section, Mapping) else None
    else:
        given = filled.get(SUBNETS) if issubclass(kind, MembersConfig | EvaluateTasksConfig | GenerateConfig) else None
    if not isinstance(given, str):
        return filled, ()
    entries, problems = _entries(given, f"init_from.{SUBNETS}" if of_family else SUBNETS)
    wanted = _asked_for(kind, filled)
    taken = [entry for entry in entries if wanted is None or str(entry["name"]) in wanted]
    if of_family:
        filled["init_from"] = {**filled["init_from"], SUBNETS: taken}
        return filled, problems
    filled[SUBNETS] = taken
    if wanted is not None and issubclass(kind, MembersConfig | EvaluateTasksConfig):
        names = {str(entry["name"]) for entry in taken}
        filled["budget_names"] = [name for name in filled["budget_names"] if str(name) not in names]
    return filled, problems


def _entries(path: str, field: str) -> tuple[list[dict[str, Any]], tuple[Problem, ...]]:
    try:
        entries = read_json(Path(path), LIMIT_BYTES).get(SUBNETS)
    except UnsafeFileError as error:
        return [], (Problem(field, path, str(error), REMEDY),)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        return [], (Problem(field, path, "holds no list of subnets with names", REMEDY),)
    return entries, ()


def _asked_for(kind: type, values: Mapping[str, Any]) -> set[str] | None:
    """Return the names that are asked for; None: all."""
    asked: Any
    if issubclass(kind, ElasticRunConfig):
        section = values.get("elastic")
        asked = section.get("budgets") if isinstance(section, Mapping) else None
        budgets = asked if isinstance(asked, list | tuple) else ()
        asked = [budget.get("name") for budget in budgets if isinstance(budget, Mapping)]
    elif issubclass(kind, GenerateConfig):
        asked = [values.get(name) for name in ("budget", "think", "answer")]
    else:
        asked = values.get("budget_names")
    return set(map(str, asked)) if isinstance(asked, list | tuple) else None
