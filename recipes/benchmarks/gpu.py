"""What one GPU makes of this project: its ceilings, our kernels, the loss, eight layers of the 12B in every execution.

A step of 512 GPUs would take

    step_s = tokens per GPU x ((case + teacher) / tokens x products of 62 layers / products of 8 + loss / its tokens)

with the times measured here and the loss at the whole vocabulary: no optimizer, no traffic between GPUs, no waiting for
other pipeline stages, no recomputation. Tokens per GPU: 1536 x 8,192 / 512 and 512 x 49,152 / 512 (the curriculum).
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elastic.model.backends import Kernels, in_words
from elastic.world.groups import Layout, world
from recipes.benchmarks import gpu_kernels, gpu_models
from recipes.benchmarks._clock import Ceilings, Clock


def run(device: torch.device, seconds: float, rounds: int, tiny: bool) -> dict[str, Any]:
    """Measure within about `seconds`; the result is what the JSON file holds."""
    clock = Clock(device, seconds, rounds)
    with world(Layout()):
        torch.manual_seed(0)
        ceilings = Ceilings.measured(clock, tiny)
        kernels = gpu_kernels.compared(clock, ceilings, tiny)
        losses = gpu_kernels.losses(clock, ceilings, tiny)
        per_token_ms = losses[-1]["ms"] / losses[-1]["loss"][0] if losses else None
        cases = gpu_models.run(clock, ceilings, per_token_ms, tiny)
        chosen = Kernels.choose()
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "parts": in_words(),
        "classes": [
            type(chosen.state_space).__name__,
            chosen.core_attention.__name__,
            type(chosen.elementwise).__name__,
        ],
        **asdict(ceilings),
        "kernels": kernels,
        "losses": losses,
        "cases": cases,
        "step_formula": " ".join(__doc__.split("\n\n", 1)[1].split()),
        "left_out": clock.left_out,
        "seconds": clock.used_s(),
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write the whole report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def show(report: dict[str, Any], console: Console) -> None:
    """Print what was left out, then the tables, the one of the model last."""
    console.print(f"{report['card']}, torch {report['torch']}: {report['parts']}")
    console.print(
        f"ceilings: {report['matmul_tflops']:.0f} TFLOP/s bf16, {report['copy_tb_per_s']:.2f} TB/s copied, "
        f"{report['launch_us']:.1f} us a launch; {report['seconds']:.0f} s in all"
    )
    for line in report["left_out"]:
        console.print(f"left out: {line}")
    console.print(_kernel_table(report["kernels"]))
    console.print(_model_table(report["losses"], report["cases"]))


def _kernel_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("our kernels at the widths of the 12B", ("kernel", "ms", "share of copy", "PyTorch ms", "launches"))
    for row in rows:
        launches = f"{row['launches']} / {row['torch_launches']}"
        table.add_row(row["kernel"], f"{row['ms']:.3f}", f"{row['copy_share']:.0%}", f"{row['torch_ms']:.3f}", launches)
    return table


def _model_table(losses: list[dict[str, Any]], cases: list[dict[str, Any]]) -> Table:
    headings = ("what", "ms", "ratio to", "share of matmul", "GiB", "launches", "step s")
    table = _table("eight layers of the 12B, forward and backward, bf16 (step: at 512 GPUs)", headings)

    def add(what: str, row: dict[str, Any]) -> None:
        ratio = f"{row['ratio']:.3f} {row['against'].split()[0]}" if "ratio" in row else "-"
        step = f"{row['step_s']:.2f}" if "step_s" in row else "-"
        figures = f"{row['ms']:.1f}", ratio, f"{row['matmul_share']:.0%}", f"{row['peak_gib']:.1f}"
        table.add_row(what, *figures, str(row["launches"]), step)

    for row in losses:
        add("loss [{:,} x {:,}]".format(*row["loss"]), row)
    for row in cases:
        add(f"{row['layers']} {row['tokens']:,} {row['case']}", row)
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table
