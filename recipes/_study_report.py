"""docs/results.md and its pictures, from the JSON files of recipes/study.py alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from recipes._study_answers import Answers, Cell
from recipes._study_pictures import draw
from recipes._study_questions import Question

WIDTH = 118
INTRODUCTION = """# Results: what the method is worth at laptop scale

Every figure on this page comes from the small files in `docs/results/`, one for an arm, a corpus and a seed:

```text
$ python recipes/study.py run one_or_several     # questions of conf/study/, none: all; go on where they stopped
$ python recipes/study.py report                 # this page and its pictures, from the files
```

`run` takes `--seeds 3`, `--processes 2` (arms at a time, one core each), `--corpora`, `--arms`, `--exp-dir`, `--name`
(where steps are kept: data, parent and ranking are made once for all arms), and `--set train_elastic:trainer=gpu` for
overrides of a verb; `--results FOLDER` before `run` or `report` keeps other files than these. An arm that fails is
named and the others go on. A question of your own is one more file in `conf/study/`: arms, and what each changes in
the chain of verbs that `conf/study/base.yaml` has, with sizes, corpora (the standard library's sources; Shakespeare's
works, which `run` fetches as a package by name) and lengths.

**How to read it.** Losses are nats per token on a test split by document that nothing was chosen by: learning rates
were searched for every arm of a question alike, with one seed, on the validation split of the question's first corpus.
One parent for each corpus, trained once; seeds are those of the family's run: order of data, budgets, router, noise.
`core s` is what a core worked for the training, beside other work: arms that ran at other times differ by a third for
that alone. `±` is the standard deviation over seeds, `n` their number. **better** and **worse** stand where a
difference to the arm compared with is larger than both deviations together, and both arms have two seeds or more; `2/3`
says with how many of the seeds that both ran the loss is lower.
"""


def verdict(cell: Cell, other: Cell) -> str:
    """Say whether one is better than the other by more than both spreads."""
    if cell.deviation is None or other.deviation is None:
        return ""
    difference = cell.mean - other.mean
    if abs(difference) <= cell.deviation + other.deviation:
        return ""
    return " **better**" if difference < 0 else " **worse**"


def tokens_to_reach(loss: float, points: Iterable[tuple[int, float]]) -> tuple[float, str]:
    """Return how many tokens reach a loss, between points (tokens, loss) on a line over log tokens.

    Where no two points have it between them, the nearest end with the sign of the bound, `<` or `>`.
    """
    ordered = sorted(points)
    for (tokens, before), (more, after) in pairwise(ordered):
        if min(before, after) <= loss <= max(before, after):
            share = 0.0 if before == after else (before - loss) / (before - after)
            return exp(log(tokens) + share * (log(more) - log(tokens))), ""
    return (ordered[-1][0], ">") if loss < min(point[1] for point in ordered) else (ordered[0][0], "<")


def token_ratios(question: Question, answers: Answers) -> Iterator[tuple[str, int, float, str, dict[str, float]]]:
    """Yield (corpus, seed, ratio, bound, tokens by member): what separate runs take to do as well as one family.

    The ratio is the sum over members of the tokens that a run of its own takes to reach the family's loss, over the
    family's tokens. Separate runs are the arms with that member alone; a seed that lacks some is left out.
    """
    alone = [file for file in answers.files if len(file["members"]) == 1 and file["tokens"]]
    for family in (file for file in answers.files if file["arm"] == question.token_ratio):
        corpus, seed = family["corpus"], family["seed"]
        taken, bounds = {}, set()
        for member in family["members"]:
            points = [
                (file["tokens"], file["members"][0]["loss"])
                for file in alone
                if (file["corpus"], file["seed"], file["members"][0]["name"]) == (corpus, seed, member["name"])
            ]
            if len(points) > 1:
                taken[member["name"]], bound = tokens_to_reach(member["loss"], points)
                bounds.add(bound)
        separate = {file["members"][0]["name"] for file in alone if file["corpus"] == corpus}
        if taken and taken.keys() == separate & {member["name"] for member in family["members"]}:
            bound = "" if bounds == {""} else ">" if "<" not in bounds else "<" if ">" not in bounds else "?"
            yield corpus, seed, sum(taken.values()) / family["tokens"], bound, taken


def write_page(questions: Sequence[Question], results: Path, page: Path) -> None:
    """Write the page and one picture for each question that has files; the others are listed."""
    parts, missing = [INTRODUCTION], []
    found = {question.name: Answers.read(question, results / question.name) for question in questions}
    parts += parent_lines(file for answers in found.values() for file in answers.files)
    for question in sorted(questions, key=lambda one: one.token_ratio is None):
        answers = found[question.name]
        if not answers.files:
            missing.append(question)
            continue
        picture = results / f"{question.name}.png"
        draw(question, answers, picture)
        parts.append(section(question, answers, picture.relative_to(page.parent, walk_up=True)))
    if missing:
        lines = [f"- {question.text} (`python recipes/study.py run {question.name}`)" for question in missing]
        parts.append("\n".join(["## Not run yet\n", *lines]) + "\n")
    page.write_text("\n".join(parts), encoding="utf-8")


def parent_lines(files: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Say how each corpus's parent was trained: the first of two trainings that an arm's chain has."""
    told = set()
    for file in files:
        if len(file["training"]) > 1 and file["corpus"] not in told:
            told.add(file["corpus"])
            parent = next(iter(file["training"].values()))
            losses = ", ".join(
                f"{loss:.2f} at {point['tokens'] / 1e3:,.0f}k"
                for point in parent["curve"]
                for loss in point["loss"].values()
            )
            yield f"The parent of {file['corpus']}: validation loss {losses} tokens.\n"


def section(question: Question, answers: Answers, picture: Path) -> str:
    """Return a question's part of the page."""
    lines = [f"## {question.text}", "", *([] if question.answer is None else [fill(question.answer, WIDTH), ""])]
    lines += [f"![{question.text}]({picture})", ""]
    ran = {file[key] for file in answers.files for key in ("arm", "corpus")}
    absent = [name for name in (*question.corpora, *question.arms) if name not in ran]
    for corpus in dict.fromkeys(corpus for corpus, _ in answers.cells):
        lines += [
            f"Corpus {corpus}:",
            "",
            "| member | arm | parameters | tokens | core s | rate | test loss | n | against ",
        ]
        lines[-1] += f"{question.compare_with} |"
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for (_, member), arms in (item for item in answers.cells.items() if item[0][0] == corpus):
            lines += [_row(member, arm, cell, arms.get(question.compare_with), question) for arm, cell in arms.items()]
        lines += ["", *_position_lines(answers, corpus)]
    if question.token_ratio is not None:
        lines += [text for line in _ratio_lines(question, answers) for text in (fill(line, WIDTH), "")]
    versions = answers.files[0]["versions"]
    told = (
        f"`{answers.files[0]['command']}`: {answers.cpu_minutes():.0f} core minutes for the runs shown, learning-rate "
    )
    rates = ", ".join(f"{rate:g}" for rate in question.rates)
    told += f"search ({rates}) not counted ({', '.join(f'{name} {is_}' for name, is_ in versions.items())})."
    if absent:
        told += f" Not run yet: {', '.join(f'`{name}`' for name in absent)}."
    lines += [fill(told, WIDTH), "", fill(f"What it does not show: {question.limits}", WIDTH)]
    return "\n".join(lines) + "\n"


def _position_lines(answers: Answers, corpus: str) -> Iterator[str]:
    """Say the loss by place in the sequence, where an arm's test has it: means over seeds, first part first."""
    parts = answers.by_position(corpus)
    for (member, arm), losses in parts.items():
        yield f"- {member}, {arm}, by place in the sequence: {', '.join(f'{loss:.3f}' for loss in losses)}"
    yield from [""] if parts else []


def _row(member: str, arm: str, cell: Cell, other: Cell | None, question: Question) -> str:
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.4f}"
    against = "" if other is None or arm == question.compare_with else f"{cell.mean - other.mean:+.4f}"
    if against and other is not None:
        both = cell.losses.keys() & other.losses.keys()
        lower = sum(cell.losses[seed] < other.losses[seed] for seed in both)
        against += f"{verdict(cell, other)} {lower}/{len(both)}"
    tokens, rate = (
        f"{cell.tokens / 1e3:,.0f}k",
        f"{cell.rate:g}" if question.arms[arm].has_rate and cell.tokens else "-",
    )
    figures = [f"{cell.params / 1e3:,.0f}k", tokens, f"{cell.seconds:.0f}" if cell.tokens else "-", rate]
    figures += [f"{cell.mean:.4f}{spread}", str(len(cell.losses)), against]
    return f"| {' | '.join((member, arm, *figures))} |"


def _ratio_lines(question: Question, answers: Answers) -> Iterator[str]:
    found = list(token_ratios(question, answers))
    for corpus in dict.fromkeys(entry[0] for entry in found):
        ratios = [(ratio, bound, taken) for name, _, ratio, bound, taken in found if name == corpus]
        figures = ", ".join(f"{bound}{ratio:.2f}" for ratio, bound, _ in ratios)
        spread = (
            f", mean {mean(r for r, _, _ in ratios):.2f} ± {stdev(r for r, _, _ in ratios):.2f}" if ratios[1:] else ""
        )
        arms = [item for name in ratios[0][2] for item in answers.cells[corpus, name].items()]
        family = next(cell for arm, cell in arms if arm == question.token_ratio)
        single = {file["arm"] for file in answers.files if len(file["members"]) == 1}
        alone = [cell for arm, cell in arms if arm in single and cell.tokens == family.tokens]
        by_member = "; ".join(
            f"{name} alone takes " + ", ".join(f"{taken[name] / 1e3:,.0f}k" for _, _, taken in ratios)
            for name in ratios[0][2]
        )
        yield (
            f"**Tokens on {corpus}: separate runs take {figures} times the family's to do as well as it{spread}** (by "
            f"seed; > and <: the family lies beyond the longest or shortest separate run). {by_member}. The family's "
            f"run takes {family.seconds:.0f} core seconds, {len(alone)} separate ones of as many tokens each "
            f"{sum(cell.seconds for cell in alone):.0f} together."
        )
