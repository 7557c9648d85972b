"""A figure of docs/results.md comes out again: the study's smallest arm, from the text to the test split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes._study_answers import Answers
from recipes._study_questions import read_question
from recipes.study import CONF, RESULTS, ROOT

QUESTION, ARM, CORPUS = "one_or_several", "small_third", "python"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_smallest_arm_of_the_study_lands_within_its_spread(tmp_path: Path) -> None:
    """The first seed once more, rates searched anew: as near its figure as its seeds lie to their mean."""
    answers = Answers.read(read_question(QUESTION, CONF), RESULTS / QUESTION)
    known = next(file for file in answers.files if (file["arm"], file["corpus"], file["seed"]) == (ARM, CORPUS, 1))
    if known["versions"]["python"].rpartition(".")[0] != f"{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip(f"the corpus is the library of Python {known['versions']['python']}")
    spread = answers.cells[CORPUS, "small"][ARM].deviation
    assert spread is not None
    study = [
        sys.executable,
        str(ROOT / "recipes" / "study.py"),
        "--results",
        str(tmp_path / "results"),
        "run",
        QUESTION,
    ]
    chosen = ["--arms", ARM, "--corpora", CORPUS, "--seeds", "1", "--processes", "1", "--exp-dir", str(tmp_path)]
    subprocess.run([*study, *chosen], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found = json.loads((tmp_path / "results" / QUESTION / f"{ARM}.{CORPUS}.1.json").read_text(encoding="utf-8"))
    assert found["members"][0]["loss"] == pytest.approx(known["members"][0]["loss"], abs=spread)
