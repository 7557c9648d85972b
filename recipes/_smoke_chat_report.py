"""What `make smoke-chat` shows: how many answers are right, by budget and by steps, and what they cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from recipes._arithmetic_chats import Problem

STEPS = (1, 2, 3)
END_OF_THOUGHT = "</think>"


def answer_row(name: str, texts: Sequence[dict[str, Any]], problems: Sequence[Problem]) -> dict[str, Any]:
    """Judge one text per problem: right answers in all and by the steps they take, tokens, and parameters read.

    `params_read` is the mean over answers of parameters times tokens written, the work of decoding one answer.
    """
    right = {steps: [0, 0] for steps in STEPS}
    for text, problem in zip(texts, problems, strict=True):
        counted = right[problem.num_steps]
        counted[0] += text["text"].rpartition(END_OF_THOUGHT)[2].strip() == problem.answer
        counted[1] += 1
    parts = [part for text in texts for part in text["parts"]]
    return {
        "name": name,
        "params": {part["name"]: part["params"] for part in parts},
        "right": sum(found for found, _ in right.values()),
        "right_by_steps": {steps: found / total for steps, (found, total) in right.items() if total},
        "accuracy": sum(found for found, _ in right.values()) / len(texts),
        "tokens": sum(part["new_tokens"] for part in parts) / len(texts),
        "params_read": sum(part["new_tokens"] * part["params"] for part in parts) / len(texts),
    }


def summary_table(summary: dict[str, Any]) -> Table:
    """Render one row per budget, or pair of budgets."""
    table = Table(title=f"one run, a family: right answers to {summary['num_problems']} questions")
    first = "thinks,\nanswers"
    for heading in (first, "params", "right", *(f"{n}\nstep{'s' * (n > 1)}" for n in STEPS), "tokens", "work"):
        table.add_column(heading, justify="left" if heading == first else "right", no_wrap=True)
    for row in summary["members"]:
        by_steps = [f"{row['right_by_steps'][steps]:.0%}" for steps in STEPS]
        params = ", ".join(f"{params / 1e6:.2f}" for params in row["params"].values()) + "M"
        work = f"{row['params_read'] / 1e6:.1f}M"
        table.add_row(row["name"], params, f"{row['accuracy']:.0%}", *by_steps, f"{row['tokens']:.1f}", work)
    return table


def draw_accuracy(summary: dict[str, Any], path: Path) -> None:
    """Draw right answers against the parameters read for one, and by the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8))
    rows = summary["members"]
    alone = [row for row in rows if len(row["params"]) == 1]
    left.plot([row["params_read"] / 1e6 for row in alone], [row["accuracy"] for row in alone], "-", color="0.7")
    for number, row in enumerate(rows):
        marker = "o" if row in alone else "D"
        left.plot(row["params_read"] / 1e6, row["accuracy"], marker, color=f"C{number}", markersize=9)
        offset = (number - (len(rows) - 1) / 2) * 0.15
        heights = [row["right_by_steps"][steps] for steps in STEPS]
        right.bar([steps + offset for steps in STEPS], heights, 0.14, color=f"C{number}", label=row["name"])
    left.set(
        xlabel="parameters read to write one answer (millions x tokens)",
        ylabel="right answers",
        title="What an answer costs and is worth",
        ylim=(0, 1.05),
    )
    left.margins(x=0.2)
    left.grid(alpha=0.3)
    right.set(xlabel="steps of the question", title="By difficulty", ylim=(0, 1.05), xticks=STEPS)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(rows), loc="lower center", title="thinks, answers")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
