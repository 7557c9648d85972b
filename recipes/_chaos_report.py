"""What chaos.py compares and shows. Imports neither torch nor this project's rooms."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

MOMENTS = ("start", "step", "step", "save", "save")
VICTIMS = ("worker 0", "worker 1", "both workers", "agent", "everything")
# Time, and the bytes of a checkpoint, whose index and config hold the path of its run.
NOT_COMPARED = ("tokens_per_s", "checkpoint/seconds", "checkpoint/blocked_seconds", "checkpoint/bytes")


def logged(folder: Path) -> dict[int, dict[str, object]]:
    """Return the numbers of a run by step; raises ChaosError where a step was logged twice with other numbers."""
    found: dict[int, dict[str, object]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if name not in NOT_COMPARED}
        known = found.setdefault(row["step"], {})
        moved = [name for name in row.keys() & known.keys() if row[name] != known[name]]
        if moved:
            raise ChaosError(f"{folder}: step {row['step']} ran twice with other numbers: {', '.join(sorted(moved))}")
        known.update(row)
    return found


def final_bytes(folder: Path) -> dict[str, bytes]:
    """Return the tensor files of the last checkpoint of a run by name: weights, optimizer state, router."""
    last = max((folder / "checkpoints").glob("step_????????"))
    files = [*last.glob("*.distcp"), *last.glob("router.safetensors")]
    return {f"{last.name}/{path.name}": path.read_bytes() for path in files}


def differing(run: Path, reference: Path) -> list[str]:
    """List the steps and files in which a run is not the reference, bit for bit."""
    rows, expected = logged(run), logged(reference)
    steps = [f"step {step}" for step in sorted(rows.keys() | expected.keys()) if rows.get(step) != expected.get(step)]
    files, wanted = final_bytes(run), final_bytes(reference)
    return steps + [name for name in sorted(files.keys() | wanted.keys()) if files.get(name) != wanted.get(name)]


class ChaosError(ValueError):
    """Something a killed run must not do: leave processes behind, or not get to its end."""


@dataclass(frozen=True)
class Kill:
    """What one attempt ended with. `steps` were logged before it, `in_save` tells whether a checkpoint was half-way."""

    moment: str
    victim: str
    steps: int
    in_save: bool


def kill_table(kills: Sequence[Kill], seconds: float) -> Table:
    """Render how many kills hit whom and when."""
    table = Table(title=f"{len(kills)} kills in {seconds:.0f} s")
    for heading in ("waited for", *VICTIMS, "inside a save"):
        table.add_column(heading, justify="left" if heading == "waited for" else "right")
    for moment in dict.fromkeys(MOMENTS):
        hits: Mapping[str, int] = Counter(kill.victim for kill in kills if kill.moment == moment)
        inside = sum(kill.in_save for kill in kills if kill.moment == moment)
        table.add_row(moment, *(str(hits.get(victim, 0)) for victim in VICTIMS), str(inside))
    return table
