"""The JSON file that a verb without a run folder writes when it is asked to: never over another one unasked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from elastic.config.training import CostConfig
from elastic.world.files import write_json


class OutputError(ValueError):
    """A file that exists already and may not be replaced."""


def check_output(config: CostConfig) -> None:
    """Raise OutputError, before any work is done, if `output` exists and may not be replaced."""
    if config.output is not None and Path(config.output).exists() and not config.exp_manager.overwrite:
        raise OutputError(
            f"output = {config.output}: exists already; choose another file, or set exp_manager.overwrite=true"
        )


def write_output(config: CostConfig, report: Mapping[str, Any], console: Console) -> None:
    """Write the report where `output` says; null writes nothing."""
    if config.output is None:
        return
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    console.print(f"written to {path}", highlight=False)
