"""Print the ratios this project is held to, each measured in one run, alternating: `make benchmark`.

Hardware: two CPU cores, 16 GiB memory, 25 GB of disk for conversion and serving. Time: about 12 minutes. `--only PART`
runs one part, `--rounds` sets how often every case of the first two runs. `--only full_size --where FOLDER` imports
the whole 12B and extracts a 6B: 75 GB of disk, about 10 minutes; it is no part of the others. `--only gpu` measures
one GPU (`make gpu`) for about `--seconds`, all of it in `--json FILE`; its code is tried out on a CPU with
`TRITON_INTERPRET=1 ... --only gpu --device cpu --tiny`.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elastic.world.groups import Layout, world
from recipes.benchmarks import batches, conversion, execution, full_size, gpu, kl, preparation, serving
from recipes.benchmarks._precisions import timed_precisions

DATA_ROUNDS = 2
BATCH_ROUNDS = 2  # one by one takes a quarter of a minute a round
PARTS = ("execution", "kl", "conversion", "serving", "batches", "data")


def execution_table(rows: list[dict[str, Any]]) -> Table:
    """Render the ratios of a training step (forward and backward)."""
    table = Table(title="time of a step, median of ratios within a round (goal: at most)")
    for heading in ("what", "5M fp32", "5M bf16", "25M fp32", "25M bf16", "goal"):
        table.add_column(heading, justify="left" if heading == "what" else "right", no_wrap=True)
    found = {(row["what"], row["model"], row["precision"]): row["ratio"] for row in rows}
    goals = {row["what"]: row["goal"] for row in rows}
    for what, goal in goals.items():
        places = [(what, model, precision) for model in ("5M", "25M") for precision in ("fp32", "bf16")]
        cells = [f"{found[place]:.2f}" if place in found else "-" for place in places]
        table.add_row(what, *cells, "-" if goal is None else f"{goal:.2f}")
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


def conversion_table(rows: list[dict[str, Any]]) -> Table:
    """Render peak memory of the verbs that move weights, at 12B widths; the ratio is to the smaller model."""
    table = Table(title="import_hf and extract at the widths of the 12B parent")
    for heading in ("verb", "layers", "folder GiB", "peak GiB", "ratio", "goal"):
        table.add_column(heading, justify="left" if heading == "verb" else "right")
    first: dict[str, float] = {}
    for row in rows:
        base = first.setdefault(row["what"], row["peak_gib"])
        cells = [f"{row['folder_gib']:.1f}", f"{row['peak_gib']:.2f}", f"{row['peak_gib'] / base:.2f}"]
        table.add_row(row["what"], str(row["num_layers"]), *cells, "<= 1.10, < 4 GiB")
    return table


def serving_table(rows: list[dict[str, Any]]) -> Table:
    """Render the memory of answering from the parent, from three budgets of one copy, and from three models."""
    table = Table(title="memory of serving, 8 layers at the widths of the 12B parent, bf16")
    for heading in ("what", "peak GiB", "ratio", "goal"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    names = {"parent": "the parent alone", "family": "three budgets, one copy", "models": "three separate models"}
    for row in rows:
        goal = "<= 1.05" if row["what"] == "family" else "-"
        table.add_row(names[row["what"]], f"{row['gib']:.2f}", f"{row['ratio']:.2f}", goal)
    return table


def batches_table(rows: list[dict[str, Any]]) -> Table:
    """Render the throughput of writing in batches, against one text after another."""
    table = Table(title="writing 16 texts of 32 tokens, 25M fp32, greedy")
    for heading in ("budget", "at once", "tokens/s", "against one by one"):
        table.add_column(heading, justify="left" if heading == "budget" else "right")
    for row in rows:
        table.add_row(row["what"], str(row["batch"]), f"{row['tokens_per_s']:,.0f}", f"{row['ratio']:.2f}")
    return table


def data_table(rows: list[dict[str, Any]]) -> Table:
    """Render tokens per second of preparing and reading data; per core is by the CPU time of all processes."""
    table = Table(title="preparing and reading data, best of the rounds")
    for heading in ("what", "processes", "MB/s", "tokens/s", "tokens/s and core"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        speeds = [f"{row['tokens'] / row[time]:,.0f}" for time in ("seconds", "cpu")]
        mb = f"{row['size'] / 1e6 / row['seconds']:.1f}" if row["size"] else "-"
        table.add_row(row["what"], str(row["processes"]), mb, *speeds)
    return table


def full_size_table(rows: list[dict[str, Any]]) -> Table:
    """Render time, speed and memory of moving the whole model, beside plain copies."""
    table = Table(title="the 12B in, a 6B out, at full size")
    for heading in ("what", "GB", "seconds", "MB/s", "peak GiB"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        peak = f"{row['peak_gib']:.2f}" if "peak_gib" in row else "-"
        table.add_row(row["what"], f"{row['gb']:.2f}", f"{row['seconds']:.0f}", f"{row['mb_per_s']:.0f}", peak)
    return table


def measure_gpu(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Measure one GPU, or try the code out on a CPU; print the tables, write the file."""
    has_gpu = torch.cuda.is_available()
    if has_gpu != (arguments.device == "cuda"):
        remedy = "hide it: CUDA_VISIBLE_DEVICES=" if has_gpu else "--device cpu --tiny tries the code out"
        parser.error(f"--device {arguments.device}: there is {'a' if has_gpu else 'no'} CUDA device; {remedy}")
    if not has_gpu and os.environ.get("TRITON_INTERPRET") != "1":  # Triton is imported already
        parser.error("--device cpu: kernels run in Triton's interpreter there; start with TRITON_INTERPRET=1 in front")
    report = gpu.run(torch.device(arguments.device), arguments.seconds, arguments.rounds or 9, arguments.tiny)
    if arguments.json is not None:
        gpu.write(report, arguments.json)
    gpu.show(report, Console(width=120))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=(*PARTS, "full_size", "gpu"))
    parser.add_argument("--where", type=Path, help="folder that full_size works in (default: for temporary files)")
    parser.add_argument("--rounds", type=int, help="how often each case runs (default: 5, of gpu 9)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of gpu; later cases are left out")
    parser.add_argument("--json", type=Path, help="file that gpu writes everything to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of gpu")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try out gpu")
    arguments = parser.parse_args()
    if arguments.only == "gpu":
        measure_gpu(arguments, parser)
        return
    # One thread: on a small machine two threads measure the scheduler as much as the code.
    torch.set_num_threads(1)
    console = Console()
    rounds = arguments.rounds or 5
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, 1 thread, {rounds} rounds")
    parts = PARTS if arguments.only is None else (arguments.only,)
    precisions = timed_precisions() if {"execution", "kl"}.intersection(parts) else (torch.float32, torch.bfloat16)
    if torch.bfloat16 not in precisions:
        console.print(
            "no instructions for bf16 here (a CPU needs AVX-512): times of a step and of the loss in fp32 only"
        )
    if "execution" in parts:
        with world(Layout()):
            console.print(execution_table(execution.run(rounds, precisions)))
    if "kl" in parts:
        console.print(kl_table(kl.run(rounds, precisions)))
    if "conversion" in parts:
        console.print(conversion_table(conversion.run()))
    if "serving" in parts:
        console.print(serving_table(serving.run()))
    if "batches" in parts:
        with world(Layout()):
            console.print(batches_table(batches.run(min(rounds, BATCH_ROUNDS))))
    if "data" in parts:
        console.print(data_table(preparation.run(min(rounds, DATA_ROUNDS))))
    if "full_size" in parts:
        console.print(full_size_table(full_size.run(arguments.where)))


if __name__ == "__main__":
    main()
