"""The pictures of docs/results.md, one for each question, from what the JSON files of recipes/study.py hold."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from recipes._study_answers import Answers
from recipes._study_questions import Question


def draw(question: Question, answers: Answers, path: Path) -> None:
    """Draw a row for each corpus: test loss over parameters; then, over tokens, the smallest member's validation loss,
    and what it keeps of each layer in the arm compared with.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    corpora = list(dict.fromkeys(corpus for corpus, _ in answers.cells))
    sizes = {name: cell.params for (_, name), arms in answers.cells.items() for cell in arms.values()}
    smallest = min(sizes, key=sizes.__getitem__)
    figure, axes = pyplot.subplots(len(corpora), 3, figsize=(16, 3.8 * len(corpora)), squeeze=False)
    for (left, right, layers), corpus in zip(axes, corpora, strict=True):
        for number, arm in enumerate(question.arms):
            color, marker = f"C{number % 10}", "osD^v"[number // 10]
            cells = [arms[arm] for (name, _), arms in answers.cells.items() if name == corpus and arm in arms]
            if not cells:
                continue
            cells.sort(key=lambda cell: cell.params)
            spread = [cell.deviation or 0.0 for cell in cells]
            sizes_k, losses = [cell.params / 1e3 for cell in cells], [cell.mean for cell in cells]
            left.errorbar(sizes_k, losses, spread, label=arm, capsize=3, color=color, marker=marker)
            points = _curve(answers, corpus, arm, smallest)
            if cells[0].tokens and points:
                right.plot([x / 1e3 for x, _ in points], [y for _, y in points], color=color)
        left.set(xlabel="parameters (thousands)", ylabel="test loss", title=f"{corpus}: size and loss")
        right.set(xlabel="tokens of the run (thousands)", ylabel="validation loss", title=f"{smallest}, on the way")
        left.legend(fontsize=7)
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
        if not _draw_positions(layers, answers, corpus, smallest):
            _draw_choices(layers, question, answers, corpus, smallest)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def _curve(answers: Answers, corpus: str, arm: str, member: str) -> list[tuple[float, float]]:
    """Return (tokens, mean loss over seeds) of a member at each validation of an arm's last training."""
    by_tokens: dict[int, list[float]] = defaultdict(list)
    for file in answers.files:
        if (file["corpus"], file["arm"]) != (corpus, arm) or not file["training"]:
            continue
        for point in [*file["training"].values()][-1]["curve"]:
            if member in point["loss"]:
                by_tokens[point["tokens"]].append(point["loss"][member])
    return sorted((tokens, mean(losses)) for tokens, losses in by_tokens.items())


def _draw_positions(axes: Any, answers: Answers, corpus: str, member: str) -> bool:
    """Draw the test loss by place in the sequence, means over seeds; returns whether the files have it."""
    losses = answers.by_position(corpus)
    for (name, arm), parts in losses.items():
        if name == member:
            axes.plot(range(1, len(parts) + 1), parts, marker="o", label=arm)
    if losses:
        axes.set(xlabel="part of the sequence", ylabel="test loss", title=f"{member}, by place in the sequence")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return bool(losses)


# One letter of the pattern: the model's width and the subnet's, which a layer of that kind has of its own.
OWN_WIDTH = {
    "M": ("model.mamba_heads", "mamba_heads"),
    "*": ("model.attention_heads", "attention_heads"),
    "-": ("model.ffn", "ffn"),
}


def _draw_choices(axes: Any, question: Question, answers: Answers, corpus: str, member: str) -> None:
    """Draw what share each layer keeps at each validation of the first seed; one that is left out keeps none."""
    arm = question.arms[question.compare_with]
    parent = arm.overrides.get("pretrain_parent", {})
    found = [file for file in answers.files if (file["corpus"], file["arm"]) == (corpus, arm.name) and file["training"]]
    curve = [*found[0]["training"].values()][-1]["curve"] if found else ()
    points = [(point["tokens"], subnet) for point in curve if (subnet := point.get("choices", {}).get(member))]
    if not points or "model.pattern" not in parent:
        axes.set_axis_off()
        return
    pattern = parent["model.pattern"]
    shares = [
        [
            subnet[kept][pattern[:layer].count(kind)] / parent[full] if layer in subnet["kept_layers"] else 0.0
            for _, subnet in points
        ]
        for layer, kind in enumerate(pattern)
        for full, kept in [OWN_WIDTH[kind]]
    ]
    axes.imshow(shares, aspect="auto", vmin=0.0, vmax=1.0, cmap="YlGnBu")
    for layer, row in enumerate(shares):
        for index, share in enumerate(row):
            axes.text(index, layer, f"{share:.0%}", ha="center", va="center", color="w" if share > 0.6 else "k", size=7)
    axes.set_xticks(range(len(points)), [f"{tokens / 1e3:,.0f}" for tokens, _ in points])
    axes.set_yticks(range(len(pattern)), [f"{layer} {kind}" for layer, kind in enumerate(pattern)])
    title = f"{member} of {arm.name}, first seed: heads or neurons kept"
    axes.set(xlabel="tokens of the run (thousands)", ylabel="layer", title=title)
