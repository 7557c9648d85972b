"""The page of recipes/study.py: what it says of files made up for it, and of the committed ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes._study_answers import Answers
from recipes._study_questions import Question, read_question
from recipes._study_report import tokens_to_reach, write_page
from recipes.smoke import ROOT

VERSIONS = {"python": "3.12"}


def test_tokens_are_read_off_between_two_runs_and_bounded_beyond_them() -> None:
    points = [(400, 2.0), (100, 4.0)]
    assert tokens_to_reach(3.0, points) == (pytest.approx(200.0), "")
    assert tokens_to_reach(1.9, points) == (400, ">") and tokens_to_reach(4.1, points) == (100, "<")


def made_up(arm: str, seed: int, tokens: int, losses: dict[str, float]) -> dict[str, Any]:
    """Return a result as recipes/study.py writes it."""
    members = [{"name": n, "params": 500 if n == "small" else 900, "loss": v, "subnet": {}} for n, v in losses.items()]
    told = {"question": "which", "arm": arm, "corpus": "text", "seed": seed, "rate": 0.1, "command": "the command"}
    curve = [{"tokens": tokens, "loss": losses}]
    return told | {
        "tokens": tokens, "members": members, "versions": VERSIONS,
        "training": {
            "pretrain_parent-1": {"tokens": 900, "curve": [{"tokens": 900, "loss": {"parent": 2.125}}]},
            f"train_elastic-{arm}{seed}": {"tokens": tokens, "curve": curve},
        },
        "cpu_seconds": {f"train_elastic-{arm}{seed}": 60.0, "pretrain_parent-1": 120.0},
    }  # fmt: skip


@pytest.fixture
def question(conf: Path) -> Question:
    """A family, and three runs of small alone."""
    file = conf / "which.yaml"
    arms = {"one": {}, **{f"alone_{tokens}": {} for tokens in (100, 300, 600)}, "later": {}}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"arms": arms}))
    return read_question("which", conf)


def test_the_page_has_means_spreads_differences_ratios_and_what_has_not_run(question: Question, tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "results" / "which"
    folder.mkdir(parents=True)
    for seed, off in ((1, 0.0), (2, 0.02)):
        files = [made_up("one", seed, 300, {"full": 2.0, "small": 3.0 + off})]
        files += [
            made_up(f"alone_{tokens}", seed, tokens, {"small": loss + off})
            for tokens, loss in ((100, 4.0), (300, 3.5), (600, 2.5))
        ]
        files[0]["members"][1]["loss_by_position"] = [3.5 + off, 2.5]
        for file in files:
            (folder / f"{file['arm']}.text.{seed}.json").write_text(json.dumps(file))
    page = tmp_path / "docs" / "results.md"
    other = Question("other", "And else?", "a", None, "", {}, (0.1,), None, {}, {}, {})
    write_page([other, question], tmp_path / "docs" / "results", page)
    text, words = page.read_text(), " ".join(page.read_text().split())
    assert "| small | one | 0k | 0k | 60 | 0.1 | 3.0100 ± 0.0141 | 2 |  |" in text
    assert "- small, one, by place in the sequence: 3.510, 2.500" in text
    assert "The parent of text: validation loss 2.12 at 1k tokens." in text
    assert "## Which?\n\nThis one.\n\n![" in text
    assert "3.5100 ± 0.0141 | 2 | +0.5000 **worse** 0/2 |" in text and "-0.5000 **better** 2/2 |" in text
    # Half-way between 300 and 600 tokens on a logarithmic line: 424 of 300.
    assert "separate runs take 1.41, 1.41 times the family's to do as well as it, mean 1.41 ± 0.00" in words
    assert "Not run yet: `later`." in words and "And else? (`python recipes/study.py run other`)" in text
    assert "10 core minutes" in words and "](results/which.png)" in text
    assert (page.parent / "results" / "which.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_says_nothing_of_better_or_worse(question: Question, tmp_path: Path) -> None:
    folder = tmp_path / "which"
    folder.mkdir()
    for arm, loss in (("one", 3.0), ("alone_100", 4.0)):
        (folder / f"{arm}.text.1.json").write_text(json.dumps(made_up(arm, 1, 100, {"small": loss})))
    answers = Answers.read(question, folder)
    assert answers.cells["text", "small"]["one"].deviation is None and answers.cpu_minutes() == 4.0
    write_page([question], tmp_path, tmp_path / "page.md")
    assert "better" not in (tmp_path / "page.md").read_text().split("## Which?")[1]


def test_the_readme_says_what_the_results_say() -> None:
    """Its bold figures, mean and spread, stand on the page that the files made, to the digits it gives."""
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    figures = re.findall(r"\*\*([\d.]+) ± ([\d.]+)\*\*", readme)
    found = re.findall(r"([\d.]+) ± ([\d.]+)", page)
    assert len(figures) == 3
    for mean, spread in figures:
        near = 0.51 * 10.0 ** -len(mean.partition(".")[2])  # the page rounds, too
        assert any(abs(float(m) - float(mean)) <= near and abs(float(s) - float(spread)) <= near for m, s in found), (
            mean
        )
