"""What the smoke run shows: summary.json, a table and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from elastic.train.data import PackedSequences, TokenStream, validation_batches


def build_summary(
    parent: dict[str, Any],
    subnets: list[dict[str, Any]],
    untrained: list[dict[str, Any]],
    extraction: list[dict[str, Any]],
    submodels: dict[str, dict[str, Any]],
    *,
    data: Path,
    parent_dir: Path,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Join the verbs' outputs into one row per budget; adds the loss of each folder in stock transformers."""
    cut = {row["name"]: row for row in untrained}
    exported = {row["name"]: row for row in extraction}
    num_tokens = parent["num_tokens"]
    family = []
    for row in subnets:
        name, folder = row["name"], exported[row["name"]]["hugging_face"]
        family.append(
            {
                "name": name,
                "target_params": row["target"],
                "params": row["params"],
                "target_ratio": row["cost_ratio"],
                "loss_subnet": row["loss"],
                "loss_submodel": submodels[name]["loss"],
                "loss_hugging_face": hugging_face_loss(Path(folder), data, num_tokens),
                "loss_pruned_untrained": cut[name]["loss"],
                "gain_over_untrained": cut[name]["loss"] - row["loss"],
                "max_abs_logit_diff_hf": exported[name]["max_abs_logit_diff"],
                "export_dir": folder,
                "subnet": row["subnet"],
            }
        )
    return {
        "parent": {
            "name": "parent",
            "target_params": None,  # nothing was asked of it and nothing is cut out of it
            "params": parent["params"],
            "loss_subnet": parent["loss"],
            "run_dir": str(parent_dir),
        },
        "family": family,
        "held_out_tokens": num_tokens,
        "seconds": seconds,
    }


def hugging_face_loss(folder: Path, data: Path, num_tokens: int, sequence_length: int = 256) -> float:
    """Return the mean cross-entropy of an exported folder in stock transformers over the same held-out sequences."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    dataset = PackedSequences(TokenStream(data / "validation"), sequence_length, 0)
    total, count = 0.0, 0
    batches = validation_batches(
        dataset,
        num_tokens // sequence_length,
        micro_batch_size=8,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    with torch.no_grad():
        for batch in batches:
            logits = model(batch.tokens, use_cache=False).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
            )
            count += batch.labels.numel()
    return total / count


def summary_table(summary: dict[str, Any]) -> Table:
    """Render one row per model of the family."""
    table = Table(title="one run, a family: held-out loss")
    headings = ("model", "params", "of target", "loss", "cut out", "in HF", "untrained", "gain")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    parent = summary["parent"]
    table.add_row("parent", f"{parent['params'] / 1e6:.3f}M", "-", f"{parent['loss_subnet']:.4f}", "-", "-", "-", "-")
    for row in summary["family"]:
        table.add_row(
            row["name"],
            f"{row['params'] / 1e6:.3f}M",
            f"{row['target_ratio']:.1%}",
            f"{row['loss_subnet']:.4f}",
            f"{row['loss_submodel']:.4f}",
            f"{row['loss_hugging_face']:.4f}",
            f"{row['loss_pruned_untrained']:.4f}",
            f"{row['gain_over_untrained']:+.3f}",
        )
    return table


def draw_family(summary: dict[str, Any], path: Path) -> None:
    """Draw loss against parameters, and the FFN width the router chose per layer and budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.1, 1))
    rows, parent = summary["family"], summary["parent"]
    millions = [row["params"] / 1e6 for row in rows]
    left.plot(
        millions, [row["loss_pruned_untrained"] for row in rows], "s--", color="0.6", label="cut without training"
    )
    left.plot(millions, [row["loss_subnet"] for row in rows], "o-", color="C0", label="family, one run")
    left.plot([parent["params"] / 1e6], [parent["loss_subnet"]], "*", color="C3", markersize=14, label="parent")
    for row, x in zip(rows, millions, strict=True):
        left.annotate(row["name"], (x, row["loss_subnet"]), textcoords="offset points", xytext=(6, 6))
    left.set(
        xlabel="parameters (millions)",
        ylabel="held-out loss (nats per token)",
        title="What each member costs and is worth",
    )
    left.legend()
    left.grid(alpha=0.3)
    depth = len(rows[0]["subnet"]["ffn"])
    bar = 0.8 / len(rows)
    for index, row in enumerate(rows):
        right.bar(np.arange(depth) + (index - (len(rows) - 1) / 2) * bar, row["subnet"]["ffn"], bar, label=row["name"])
    right.set(xlabel="FFN layer", ylabel="neurons", title="FFN width the router chose")
    right.set_xticks(range(depth))
    right.legend(loc="lower right", framealpha=0.95)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
