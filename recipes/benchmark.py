"""Print the ratios this project is held to, each measured in one run, alternating: `make benchmark`.

Hardware: two CPU cores. Time: about 6 minutes. `--only execution` or `--only kl` runs one part, `--rounds` sets how
often every case runs.
"""

import argparse
import os
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elastic.modules.model import Layout
from elastic.train.parallel import world
from recipes.benchmarks import execution, kl


def execution_table(rows: list[dict[str, Any]]) -> Table:
    """Render the ratios of a training step (forward and backward)."""
    table = Table(title="time of a step, median of ratios within a round")
    for heading in ("what", "5M fp32", "5M bf16", "25M fp32", "25M bf16", "goal"):
        table.add_column(heading, justify="left" if heading == "what" else "right", no_wrap=True)
    found = {(row["what"], row["model"], row["precision"]): row["ratio"] for row in rows}
    goals = {row["what"]: row["goal"] for row in rows}
    for what, goal in goals.items():
        cells = [f"{found[what, model, precision]:.2f}" for model in ("5M", "25M") for precision in ("fp32", "bf16")]
        table.add_row(what, *cells, "-" if goal is None else f"<= {goal:.2f}")
    return table


def kl_table(rows: list[dict[str, Any]]) -> Table:
    """Render time and peak memory of the distillation loss against its unchunked self."""
    table = Table(title="distillation loss, forward and backward, against one chunk")
    for heading in ("size", "dtype", "variant", "time ratio", "peak MiB", "memory ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["size"]),
            str(row["dtype"]),
            str(row["variant"]),
            f"{row['time_ratio']:.2f}",
            f"{row['peak_mib']:.1f}",
            f"{row['memory_ratio']:.2f}",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("execution", "kl"))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    # One thread: on a small machine two threads measure the scheduler as much as the code.
    torch.set_num_threads(1)
    console = Console()
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, 1 thread, {arguments.rounds} rounds")
    if arguments.only != "kl":
        with world(Layout()):
            console.print(execution_table(execution.run(arguments.rounds)))
    if arguments.only != "execution":
        console.print(kl_table(kl.run(arguments.rounds)))


if __name__ == "__main__":
    main()
