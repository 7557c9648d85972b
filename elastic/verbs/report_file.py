"""What verbs report: tables, and the JSON file of a verb without a run folder, never over another one unasked."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic.config.load import ConfigError, Problem
from elastic.config.verbs import CostConfig, GenerateConfig
from elastic.world.files import nearest_existing, write_json

WIDEST_COLUMNS = 10_000


class OutputError(ConfigError):
    """A file that exists already and may not be replaced."""


def output_file_problems(config: CostConfig | GenerateConfig) -> Iterator[Problem]:
    """Yield a problem if `output` exists and may not be replaced, or cannot be a file."""
    if config.output is None:
        return
    section, prefix = (config, "") if isinstance(config, GenerateConfig) else (config.exp_manager, "exp_manager.")
    path = Path(config.output)
    above = nearest_existing(path.absolute().parent)
    if path.is_dir() or not above.is_dir():
        rule = "is a folder" if path.is_dir() else f"{above} is no folder"
        yield Problem("output", config.output, rule, "name a file in a folder")
    elif path.exists() and not section.overwrite:
        remedy = f"choose another file, or set {prefix}overwrite=true"
        yield Problem("output", config.output, "exists already", remedy)


def check_output(config: CostConfig | GenerateConfig) -> None:
    """Raise OutputError, before any work is done, if `output` exists and may not be replaced."""
    if problems := tuple(output_file_problems(config)):
        raise OutputError(problems)


def write_output(config: CostConfig | GenerateConfig, report: Mapping[str, Any], console: Console) -> None:
    """Write the report where `output` says; null writes nothing."""
    if config.output is None:
        return
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    console.print(f"written to {path}", highlight=False)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Render rows under headings, all but the first column to the right."""
    found = Table(title=title)
    for number, heading in enumerate(headings):
        found.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    return found


def print_table(found: Table, console: Console) -> None:
    """Print a table as wide as it is: a narrower terminal, or a job's log, wraps its lines instead of losing digits."""
    whole = console.measure(found, options=console.options.update(max_width=WIDEST_COLUMNS)).maximum
    console.width = max(console.width, whole)
    console.print(found)
