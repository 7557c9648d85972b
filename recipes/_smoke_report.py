"""What the smoke run shows: summary.json, a table and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.record import Record
from elastic.data.held_out import HeldOut, validation_batches
from elastic.data.tokens import TokenStream
from elastic.space.axes import AXES, INNER_AXIS, LayerKind
from elastic.space.shape import ModelShape

UNITS = {LayerKind.MAMBA: "Mamba\nheads", LayerKind.MLP: "FFN\nneurons", LayerKind.ATTENTION: "query\nheads"}


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
    shape = Record.read(list_checkpoints(parent_dir)[0]).shape
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
                "layers": layer_widths(shape, row["subnet"]),
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


def layer_widths(shape: ModelShape, subnet: dict[str, Any]) -> list[dict[str, Any]]:
    """Say layer by layer of the parent how wide a subnet is there (null: skipped), and how wide the parent."""
    rows = []
    for index, kind in enumerate(shape.pattern.kinds):
        width = subnet[AXES[INNER_AXIS[kind]].size][shape.pattern.ordinal(index)]
        kept = width if index in subnet["kept_layers"] else None
        rows.append({"kind": str(kind), "width": kept, "parent_width": shape.width(index)})
    return rows


def hugging_face_loss(folder: Path, data: Path, num_tokens: int, sequence_length: int = 256) -> float:
    """Return the mean cross-entropy of an exported folder in stock transformers over the same held-out sequences."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    held_out = HeldOut(TokenStream(data / "validation"), sequence_length)
    total, count = 0.0, 0
    batches = validation_batches(
        held_out, num_tokens // sequence_length, micro_batch_size=8, data_parallel_rank=0, data_parallel_size=1
    )
    with torch.no_grad():
        for _, batch in batches:
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
    """Draw loss against parameters, and what the router chose: the width of every layer, or that it is skipped."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 4.8), width_ratios=(1, 1.5))
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
    left.margins(x=0.12)
    left.legend()
    left.grid(alpha=0.3)
    shares = [[(layer["width"] or 0) / layer["parent_width"] for layer in row["layers"]] for row in rows]
    right.pcolormesh(np.array(shares), cmap="Blues", vmin=0.0, vmax=1.6, edgecolors="white", linewidth=2)
    right.invert_yaxis()
    for y, row in enumerate(rows):
        for x, layer in enumerate(row["layers"]):
            text = "skipped" if layer["width"] is None else str(layer["width"])
            right.text(x + 0.5, y + 0.5, text, ha="center", va="center", size=8)
    right.set(title="What the router chose, layer by layer")
    layers = rows[0]["layers"]
    right.set_xticks(np.arange(len(layers)) + 0.5, [UNITS[LayerKind(layer["kind"])] for layer in layers], size=8)
    subnets = {row["name"]: row["subnet"] for row in rows}
    names = [f"{name}\nhidden {s['hidden']}\nchannels {s['head_channels']}" for name, s in subnets.items()]
    right.set_yticks(np.arange(len(rows)) + 0.5, names)
    right.tick_params(length=0)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
