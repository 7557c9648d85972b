"""The study: questions are read or refused, steps shared, what is done is kept, and the page says what files say."""

import json
import sys
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from itertools import product
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from elastic.config.load import ConfigError, load
from elastic.verbs.parent import fill_from_parent
from recipes._common import CONF
from recipes._forked import _run_verb
from recipes._study_questions import question_names, read_question
from recipes._verbs import VERBS
from recipes.smoke import Smoke
from recipes.study import Study, main, run_questions

STUDY = CONF / "study"
VERSIONS = {"python": "3.12"}


@cache
def composed(verb: str, *groups: str) -> DictConfig:
    """Compose a verb's run once, with other files of its groups."""
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        return compose(verb, list(groups))


def test_every_step_of_every_question_is_a_config_of_its_verb() -> None:
    """Keys and types, as the verb would load them; a file that an earlier step writes is not there yet."""
    steps, parser = {}, OverridesParser.create()
    for name in question_names(STUDY):
        question = read_question(name, STUDY)
        for arm, corpus in product(question.arms.values(), question.corpora.values()):
            steps |= {step.name: step for step in arm.steps(corpus, seed=1, rate=1e-3)}
    for step in steps.values():
        given = dict(override.split("=", 1) for override in step.arguments(Path("runs/study")))
        groups = [f"{key}={given.pop(key)}" for key in ("budgets",) if key in given]
        config = deepcopy(composed(given.pop("--config-name", step.verb), *groups))
        for key, value in given.items():
            value = f"'{value}'" if key == "constraint" else value  # as recipes/_arguments.py does
            if not value.endswith(".json"):
                OmegaConf.update(config, key, parser.parse_override(f"{key}={value}").value(), force_add=True)
        values: Any = OmegaConf.to_container(config, resolve=True)
        kind = VERBS[step.verb].config
        if step.verb in ("train_elastic", "measure_latency"):
            values["model"] = {"vocab": 512}
        load(kind, fill_from_parent(kind, values)[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compare_with": "on"}, "did you mean one?"),
        ({"corpora": ["texts"]}, "did you mean text?"),
        ({"limit": "x"}, "did you mean limits?"),
        ({"arms": {"one": {"train_elastik": {}}}}, "did you mean train_elastic?"),
        ({"like": "whom"}, "which.like"),
        ({"like": "which"}, "name that one"),
        ({"like": "base"}, "which.like"),
        ({"like": 5}, "which.like = 5"),
        ({"arms": ["one"]}, "arms that are not names"),
        ({"arms": {"one": None}}, "arms that are not names"),
        ({"arms": {"one": {"pretrain_parent": {"x": "{evaluate}"}}}}, "which.arms.one.pretrain_parent"),
    ],
)
def test_a_question_with_a_mistake_is_refused_by_name(conf: Path, change: dict[str, Any], says: str) -> None:
    file = conf / "which.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        read_question("which", conf)
    with pytest.raises(ConfigError, match="nearest is which"):
        read_question("wich", conf)


@pytest.mark.parametrize(("text", "says"), [("", "no keys"), ("- 1", "no keys"), ("a: [", "is no YAML")])
def test_a_file_that_is_no_question_is_refused_by_name(conf: Path, text: str, says: str) -> None:
    (conf / "which.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_question("which", conf)


@pytest.mark.parametrize("option", ["--seeds=0", "--processes=-1", "--seeds=x"])
def test_counts_are_refused_before_anything_is_fetched(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["study.py", "run", "axes", option]), pytest.raises(SystemExit):
        main()
    assert "must be a whole number, at least 1" in capsys.readouterr().err


def test_a_question_like_another_has_its_arms_and_its_own_beside_them(conf: Path) -> None:
    again = {"like": "which", "question": "Again?", "arms": {"two": {"train_elastic": {"lr": "{rate*3}"}}, "three": {}}}
    again["verbs"] = {"train_elastic": {"seed": 7}}
    (conf / "again.yaml").write_text(yaml.safe_dump(again))
    first, second = (read_question(name, conf) for name in ("which", "again"))
    assert (second.text, second.answer, second.limits) == ("Again?", None, first.limits)
    assert (second.token_ratio, second.compare_with, second.corpora) == ("one", "one", first.corpora)
    assert {name: arm.overrides["train_elastic"] for name, arm in second.arms.items()} == {
        name: {"lr": rate, "seed": 7, "parent": "{pretrain_parent}"}
        for name, rate in (("one", "{rate}"), ("two", "{rate*3}"), ("three", "{rate}"))
    }
    assert first.arms["one"].overrides["train_elastic"]["seed"] == "{seed}"


class Verbs(Smoke):
    """Takes the place of the verbs' programs: writes what they would, and remembers what was asked."""

    def __init__(self, folder: Path, failing: str = "") -> None:
        super().__init__(folder, 1, (), Console(quiet=True))
        self.failing, self.ran = failing, list[str]()

    def run(self, verb: str, version: str, arguments: Any = (), **kwargs: Any) -> Path:
        target, values = self.folder / version, dict(a.split("=", 1) for a in arguments)
        if (self.folder / f".{version}.done").exists():
            return target
        self.ran.append(verb)
        if self.failing and values.get("lr") == self.failing:
            raise SystemExit(f"{verb} failed with code 1")
        target.mkdir()
        (self.folder / f".{version}.done").write_text("2.0 60.0\n")
        loss = 3.0 + float(values.get("lr", 0)) + float(values.get("seed", 0)) / 100
        if verb == "evaluate":
            read = values["init_from.checkpoint"]
            loss = json.loads((Path(read) / "metrics.jsonl").read_text().splitlines()[-1])["validation/small/loss"]
            rows = [{"name": "small", "params": 1000, "loss": loss, "subnet": {}}]
            (target / "evaluation.json").write_text(json.dumps({"members": rows}))
        else:
            phases = [{"global_batch": 2, "sequence_length": 8, "steps": 4}]
            (target / "config.json").write_text(json.dumps({"curriculum": phases}))
            rows = [{"step": 4, "router/small/cost_ratio": 1.0}, {"step": 4, "validation/small/loss": loss}]
            (target / "choices.jsonl").write_text(json.dumps({"step": 4, "choices": {"small": {"hidden": 8}}}) + "\n")
            (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return target


def asked(conf: Path, tmp_path: Path, failing: str = "") -> tuple[list[str], list[str]]:
    """Ask the question with two seeds, one arm at a time; returns what ran and what failed."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    verbs = Verbs(tmp_path / "runs", failing)
    failed = run_questions(Study(verbs, tmp_path / "results"), [read_question("which", conf)], (1, 2), 1)
    return verbs.ran, failed


def test_steps_are_shared_rates_are_searched_and_what_is_done_is_skipped(conf: Path, tmp_path: Path) -> None:
    ran, failed = asked(conf, tmp_path)
    # One parent; two rates of two arms with one seed, the better rate with the other; half of 0.2 is 0.1 of the other.
    assert (ran.count("pretrain_parent"), ran.count("train_elastic"), failed) == (1, 3 + 2, [])
    found = json.loads((tmp_path / "results" / "which" / "two.text.2.json").read_text())
    assert (found["rate"], found["rates_tried"]) == (0.1, pytest.approx({"0.1": 3.06, "0.2": 3.11}))
    assert (found["tokens"], found["members"][0]["loss"]) == (64, pytest.approx(3.07))
    training = [entry for name, entry in found["training"].items() if name.startswith("train_elastic")]
    last = training[0]["curve"][0]
    assert (last["tokens"], last["router"]) == (64, {"small/cost_ratio": 1.0})
    assert last["choices"] == {"small": {"hidden": 8}}
    assert sum(found["cpu_seconds"].values()) == 180.0
    assert asked(conf, tmp_path) == ([], [])


def test_an_arm_that_fails_is_named_and_the_others_go_on(conf: Path, tmp_path: Path) -> None:
    _, failed = asked(conf, tmp_path, failing="0.05")
    assert len(failed) == 2 and all("which, two, text" in text and "train_elastic failed" in text for text in failed)
    assert sorted(file.name for file in (tmp_path / "results" / "which").iterdir()) == [
        "one.text.1.json",
        "one.text.2.json",
    ]
    assert len(asked(conf, tmp_path)[0]) > 0  # and tried again by the next call


@pytest.mark.parametrize(("ending", "code"), [(SystemExit(2), 2), (SystemExit("no"), 1), (SystemExit(), 0), (None, 0)])
def test_a_forked_verb_says_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: SystemExit | None, code: int
) -> None:
    """Through its pipe: of two threads that ask the fork server, one may be told 255."""

    def start(verb: str) -> None:
        if ending is not None:
            raise ending

    monkeypatch.setattr("recipes._start.start", start)
    monkeypatch.setattr("os.dup2", lambda *files: None)  # the output stays this process's
    monkeypatch.setattr("sys.argv", [])
    receiver, sender = Pipe(duplex=False)
    with nullcontext() if ending is None else pytest.raises(SystemExit):
        _run_verb("evaluate", [], tmp_path / "log", sender)
    assert receiver.recv()[0] == code
