"""Write the page about a run, at its end and at any time, from what its folder holds."""

from pathlib import Path
from typing import Any

from elastic.checkpoint.contents import CheckpointError
from elastic.checkpoint.record import RecordError
from elastic.config.load import ConfigError, Problem
from elastic.config.verbs import MembersInput
from elastic.hf.safe_files import UnsafeFileError, read_json
from elastic.report.page import event_table, last_losses, member_table, page, phase_table, read_rows
from elastic.router.decide import RouterError
from elastic.run.folder import CONFIG_FILE, FINISHED_FILE
from elastic.train.log import EVENTS_FILE, METRICS_FILE
from elastic.verbs.members import MembersError, open_checkpoint
from elastic.world.files import explained, written_aside

REPORT_FILE = "report.html"
_MAX_BYTES = 16_000_000


class ReportError(ConfigError):
    """A folder that is no run's, or a page that cannot be written."""


def write_report(run: Path) -> Path:
    """Write report.html into a run's folder, also while it trains, and return its path.

    Raises ReportError for a folder without a log, or where that cannot be read or the page not be written.
    """
    path = run / REPORT_FILE
    try:
        rows, events = read_rows(run / METRICS_FILE), read_rows(run / EVENTS_FILE)
    except OSError as error:
        rule, remedy = f"cannot be read: {error.strerror}", "look after the folder, or give another"
        raise ReportError([Problem("run", str(run), rule, remedy)]) from error
    if not rows:
        rule = f"holds no {METRICS_FILE} with a row of a training run"
        raise ReportError([Problem("run", str(run), rule, "give the folder of a run, as in runs/family/version_0")])
    finished, config = _read(run / FINISHED_FILE), _read(run / CONFIG_FILE)
    reached = max(row["step"] for row in rows)
    state = f"step {reached:,}" + (f", ended: {finished.get('reason')}" if finished else ", not finished")
    losses = last_losses(rows)
    sections = {
        "Members": _members(run, losses),
        "Phases": phase_table(config),
        "Events": event_table(events),
    }
    try:
        with written_aside(path) as aside:
            aside.write_text(page("/".join(run.resolve().parts[-2:]), state, rows, sections), encoding="utf-8")
    except OSError as error:
        rule, remedy = f"the page was not written: {explained(error, path)}", "make room, or look after the folder"
        raise ReportError([Problem("run", str(run), rule, remedy)]) from error
    return path


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file of the run; nothing where it is not there or damaged."""
    try:
        return read_json(path, _MAX_BYTES)
    except UnsafeFileError:
        return {}


def _members(run: Path, losses: dict[str, float]) -> str:
    """Return the table of members as the newest whole checkpoint has them; before the first, or of damage, nothing."""
    try:
        opened = open_checkpoint(MembersInput(checkpoint=str(run)), None, (), full=False)
    except (CheckpointError, RecordError, MembersError, RouterError):
        return ""
    members = [(member.name, member.subnet, member.budget) for member in opened.members]
    return member_table(opened.space.parent, members, opened.deployment, losses)
