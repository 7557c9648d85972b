"""The verb evaluate_tasks: lm-eval's tasks on budgets and subnets of a nested checkpoint, or on an exported folder."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.config.load import ConfigError, Problem
from elastic.config.rules_layout import layout_problems
from elastic.config.tasks import EvaluateTasksConfig
from elastic.data.manifest import DataError
from elastic.data.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG
from elastic.hf.export_settings import ExportSettingsError
from elastic.hf.folder import HfFolderError, open_hf_folder
from elastic.hf.safe_files import UnsafeFileError, read_json
from elastic.hf.tokenizer_files import MAX_BYTES
from elastic.run.folder import open_run_folder
from elastic.run.world import run_world
from elastic.space.cost import subnet_cost
from elastic.space.shape import Subnet
from elastic.verbs.generate import own_text
from elastic.verbs.members import members_problems, open_checkpoint, subnet_summary
from elastic.verbs.report_file import print_table, table
from elastic.verbs.text import TOKENIZER_REMEDY, served_tokenizer_problems
from elastic.world.files import write_json
from elastic.world.groups import World, decided_by_rank_0

TASKS_FILE, PICTURE_FILE = "tasks.json", "tasks.png"
Scores = dict[str, dict[str, Any]]  # of each task its metrics by name, and what lm-eval says of their errors


class TasksError(ConfigError):
    """Tasks, or members with a time, that nobody knows."""


def run_evaluate_tasks(config: EvaluateTasksConfig, console: Console) -> Path:
    """Score every member on every task, write tasks.json and tasks.png; returns the run folder.

    Raises TasksError for a task that neither lm-eval nor `include_path` has, or that cannot be asked, before anything
    is written, and for a time of no member before any weight is read.
    """
    with ExitStack() as opened:
        here = opened.enter_context(run_world(config))
        from elastic.tasks import scoring  # it imports lm-eval, which not everybody has, and takes seconds

        manager = scoring.task_manager(config.tasks, config.include_path)
        if problems := tuple(_unknown_tasks(config.tasks, manager.all_tasks)):
            raise TasksError(problems)
        # Asked on one rank: what its node lacks all ranks leave with.
        said = decided_by_rank_0(lambda: [scoring.what_is_wrong(name, manager, config) for name in config.tasks], here)
        if problems := tuple(_broken_tasks(config.tasks, said)):
            raise TasksError(problems)
        folder = opened.enter_context(open_run_folder(config.exp_manager, asdict(config), here))
        evaluator = scoring.Evaluator(config, manager)
        rows = []
        for row in (_of_folder if config.folder is not None else _of_members)(config, evaluator, here, console):
            rows.append({**row, "latency_ms": config.latency_ms.get(row["name"], row["latency_ms"])})
            if here.is_main:
                console.print(f"{row['name']}: {len(row['tasks'])} tasks and groups scored", highlight=False)
        if here.is_main:
            source, higher = config.folder or config.init_from.checkpoint, evaluator.higher_is_better
            write_json(folder / TASKS_FILE, {"source": source, "higher_is_better": higher, "members": rows})
            draw_scores(rows, folder / PICTURE_FILE)
            print_table(scores_table(rows), console)
    return folder


def _of_members(config: EvaluateTasksConfig, evaluator: Any, here: World, console: Console) -> Iterator[dict[str, Any]]:
    """Score members of the nested checkpoint, one after another, from one copy of its weights."""
    opened = open_checkpoint(config.init_from, config.budget_names, config.subnets, world=here, say=console.print)
    _check_times(config, [member.name for member in opened.members])
    settings, path = own_text(config.tokenizer, opened.checkpoint, opened.record)
    model = opened.load_model(here.layout).eval()
    for member in opened.members:
        scores = evaluator.nested(model, member.subnet, Path(str(config.tokenizer or path)), settings)
        cost = subnet_cost(opened.space.parent, member.subnet, opened.deployment)
        told = {"name": member.name, "params": cost.params, "latency_ms": cost.latency_ms}
        yield {**told, "subnet": subnet_summary(member.subnet), "tasks": scores}


def _of_folder(config: EvaluateTasksConfig, evaluator: Any, here: World, console: Console) -> Iterator[dict[str, Any]]:
    """Score an exported folder with lm-eval's own hf."""
    folder = Path(str(config.folder))
    shape = open_hf_folder(folder).shape
    _check_times(config, [folder.resolve().name])
    params = subnet_cost(shape, Subnet.full(shape)).params
    told = {"name": folder.resolve().name, "params": params, "latency_ms": None, "subnet": None}
    yield {**told, "tasks": evaluator.exported(folder, here.device)}


def _unknown_tasks(wanted: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
    for index, name in enumerate(wanted):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            remedy = f"nearest is {near[0]}" if near else "name a task of lm-eval, or set include_path"
            yield Problem(f"tasks.{index}", name, "is no task of lm-eval or of include_path", remedy)


def _broken_tasks(wanted: Sequence[str], said: Sequence[str | None]) -> Iterator[Problem]:
    for index, (name, error) in enumerate(zip(wanted, said, strict=True)):
        if error is not None:
            remedy = "mend the task or num_fewshot; data that it names lm-eval fetches where there is a network"
            yield Problem(f"tasks.{index}", name, f"cannot be asked: {error}", remedy)


def _check_times(config: EvaluateTasksConfig, names: Sequence[str]) -> None:
    unknown = [name for name in config.latency_ms if name not in names]
    if unknown:
        rule, remedy = "names none of the members", f"they are {', '.join(names)}"
        raise TasksError([Problem(f"latency_ms.{name}", config.latency_ms[name], rule, remedy) for name in unknown])


def tasks_problems(config: EvaluateTasksConfig) -> Iterator[Problem]:
    """Yield a problem for a folder that cannot be opened, members that are not there, weights that cannot be split, and
    a tokenizer that does not fit; checkpoints can be opened (`source_problems`).
    """
    source, folder = config.init_from, config.folder
    if (source.checkpoint is None) == (folder is None):
        return  # the rules between fields say so
    if folder is not None:
        try:
            shape = open_hf_folder(Path(folder)).shape
        except HfFolderError as error:
            yield Problem("folder", folder, str(error), "give a folder that recipes/extract.py wrote")
            return
        yield from served_tokenizer_problems(config.tokenizer, Path(folder), "folder", shape)
        yield from _template_problems(config, Path(config.tokenizer or folder))
        return
    checkpoint = resolve_checkpoint(str(source.checkpoint))
    record = Record.read(checkpoint)
    yield from members_problems(source, config.budget_names, config.subnets)
    yield from layout_problems(record.shape, config.parallel, record.lanes if record.lanes > 1 else None)
    try:
        own = own_text(config.tokenizer, checkpoint, record)[1]
    except (DataError, ExportSettingsError) as error:
        yield Problem("tokenizer", None, str(error), TOKENIZER_REMEDY)
        return
    yield from served_tokenizer_problems(config.tokenizer, own, str(source.checkpoint), record.shape)
    if config.tokenizer is not None or own is not None:
        yield from _template_problems(config, Path(str(config.tokenizer or own)))


def _template_problems(config: EvaluateTasksConfig, tokenizer: Path) -> Iterator[Problem]:
    """Yield a problem for questions that are to be put into a chat template which the tokenizer does not have."""
    settings = tokenizer / TOKENIZER_CONFIG
    if not config.chat_template or (tokenizer / CHAT_TEMPLATE).is_file():
        return
    try:
        has_own = settings.is_file() and bool(read_json(settings, MAX_BYTES).get("chat_template"))
    except UnsafeFileError as error:
        yield Problem("tokenizer", str(tokenizer), str(error), TOKENIZER_REMEDY)
        return
    if not has_own:
        rule = f"tokenizer {tokenizer} has no chat template"
        yield Problem("chat_template", True, rule, "set chat_template=false, or tokenizer=FOLDER with one")


def headline(metrics: Mapping[str, Any]) -> tuple[str, float, float | None]:
    """Return the metric that stands for a task, its value and its standard error: accuracy where there is one."""
    values = {name: value for name, value in metrics.items() if "_stderr" not in name and isinstance(value, float)}
    name = next((name for name in values if name.partition(",")[0] == "acc"), next(iter(values)))
    metric, _, filtered = name.partition(",")
    error = metrics.get(f"{metric}_stderr,{filtered}")
    return metric, values[name], error if isinstance(error, float) else None


def scores_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Render the rows of tasks.json: of every task its headline."""
    timed = any(row["latency_ms"] is not None for row in rows)
    tasks = {task: headline(metrics)[0] for task, metrics in rows[0]["tasks"].items()}
    headings = ("name", "params", *(("ms",) if timed else ()), *(f"{task} {metric}" for task, metric in tasks.items()))

    def line(row: Mapping[str, Any]) -> Iterator[str]:
        yield from (row["name"], f"{row['params'] / 1e6:,.3f}M")
        if timed:
            yield "-" if row["latency_ms"] is None else f"{row['latency_ms']:,.3f}"
        for task in tasks:
            _, value, error = headline(row["tasks"][task])
            yield f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

    return table("tasks", headings, [list(line(row)) for row in rows])


def draw_scores(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each task's headline against parameters, and against latency where it is known; with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = {"parameters (millions)": [(row["params"] / 1e6, row) for row in rows]}
    if timed := [(row["latency_ms"], row) for row in rows if row["latency_ms"] is not None]:
        axes["latency (ms)"] = timed
    tasks = list(rows[0]["tasks"])
    size = (5.5 * len(axes), 3.2 * len(tasks))
    figure, grid = pyplot.subplots(len(tasks), len(axes), figsize=size, squeeze=False, layout="constrained")
    for task, line in zip(tasks, grid, strict=True):
        for (label, points), panel in zip(axes.items(), line, strict=True):
            points = sorted(points, key=lambda point: point[0])
            found = [headline(row["tasks"][task]) for _, row in points]
            x, y = [x for x, _ in points], [value for _, value, _ in found]
            panel.errorbar(x, y, [error or 0.0 for *_, error in found], fmt="o-", capsize=3)
            for (place, row), value in zip(points, y, strict=True):
                panel.annotate(row["name"], (place, value), textcoords="offset points", xytext=(6, 6))
            panel.set(xlabel=label, ylabel=found[0][0], title=task)
            panel.margins(x=0.15, y=0.2)
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
