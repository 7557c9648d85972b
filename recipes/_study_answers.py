"""What the JSON files of recipes/study.py hold, by corpus, member of the family and arm."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from recipes._study_questions import Question

SECONDS_PER_MINUTE = 60


@dataclass(frozen=True)
class Cell:
    """What the seeds of one arm came to, for one corpus and one member."""

    losses: Mapping[int, float]  # by seed
    params: float
    tokens: int
    rate: float
    seconds: float  # of one core, for the training that is tested

    @property
    def mean(self) -> float:
        """Return the mean loss."""
        return mean(self.losses.values())

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation over seeds; None of one seed."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Answers:
    """All files of one question: `cells` by corpus, member and arm."""

    files: Sequence[Mapping[str, Any]]
    cells: Mapping[tuple[str, str], Mapping[str, Cell]] = field(default_factory=dict)

    @classmethod
    def read(cls, question: Question, folder: Path) -> "Answers":
        """Read a question's files, in the order of its arms; of arms that it no longer has, none."""
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        files = [file for file in files if file["arm"] in question.arms and file["corpus"] in question.corpora]
        files.sort(key=lambda file: (list(question.arms).index(file["arm"]), file["corpus"], file["seed"]))
        rows: dict[tuple[str, str, str], list[tuple[Any, Any]]] = defaultdict(list)
        for file in files:
            for member in file["members"]:
                rows[file["corpus"], member["name"], file["arm"]].append((file, member))
        cells: dict[tuple[str, str], dict[str, Cell]] = defaultdict(dict)
        for (corpus, name, arm), found in rows.items():
            cells[corpus, name][arm] = Cell(
                {file["seed"]: member["loss"] for file, member in found},
                mean(member["params"] for _, member in found),
                found[0][0]["tokens"],
                found[0][0]["rate"],
                mean(file["cpu_seconds"][list(file["training"])[-1]] for file, _ in found),
            )
        return cls(files, cells)

    def cpu_minutes(self) -> float:
        """Return what cores worked for all of it, steps that arms share counted once, searches of rates not."""
        steps = {name: seconds for file in self.files for name, seconds in file["cpu_seconds"].items()}
        return sum(steps.values()) / SECONDS_PER_MINUTE

    def by_position(self, corpus: str) -> dict[tuple[str, str], list[float]]:
        """Return, by member and arm, the loss of each part of the sequence, where a test has it: means over seeds."""
        parts: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for file in (file for file in self.files if file["corpus"] == corpus):
            for member in (member for member in file["members"] if "loss_by_position" in member):
                parts[member["name"], file["arm"]].append(member["loss_by_position"])
        return {of: [mean(at) for at in zip(*losses, strict=True)] for of, losses in parts.items()}
