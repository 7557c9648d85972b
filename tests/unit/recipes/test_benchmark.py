"""The benchmark leaves out what a machine cannot time, and says so in its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.benchmark import execution_table
from recipes.benchmarks import _precisions, gpu_models
from recipes.benchmarks._clock import Clock
from recipes.benchmarks._precisions import MAX_SLOWDOWN, bf16_slowdown, timed_precisions


@pytest.mark.parametrize(("slowdown", "count"), [(0.5, 2), (MAX_SLOWDOWN, 2), (90.0, 1)])
def test_bf16_is_timed_where_the_processor_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, slowdown: float, count: int
) -> None:
    monkeypatch.setattr(_precisions, "bf16_slowdown", lambda: slowdown)
    assert timed_precisions() == (torch.float32, torch.bfloat16)[:count]


def test_the_slowdown_is_measured() -> None:
    assert bf16_slowdown() > 0


def test_a_precision_that_was_not_timed_is_a_dash() -> None:
    row = dict(what="mask 3 / plain", precision="fp32", goal=1.10)
    table = execution_table([{**row, "model": model, "ratio": ratio} for model, ratio in (("5M", 1.06), ("25M", 1.07))])
    assert [list(column.cells) for column in table.columns] == [
        ["mask 3 / plain"], ["1.06"], ["-"], ["1.07"], ["-"], ["1.10"],
    ]  # fmt: skip


def test_what_a_gpu_measures_runs_in_tiny_on_a_cpu(tmp_path: Path) -> None:
    """Every line of `make gpu`'s benchmark, kernels in Triton's interpreter; a process of its own, for its groups."""
    file, root = tmp_path / "report" / "gpu.json", Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(root / "recipes" / "benchmark.py"), "--only", "gpu", "--device", "cpu", "--tiny"]
    run = subprocess.run(
        [*command, "--rounds", "1", "--json", str(file)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    report = json.loads(file.read_text())
    assert all(report[name] > 0 for name in ("matmul_tflops", "copy_tb_per_s", "launch_us")) and report["card"] == "CPU"
    kernels = {"norm", "gated group norm", "squared ReLU", "residual", "convolution"}
    assert {row["kernel"] for row in report["kernels"][:-1]} == {
        f"{name}, {which}" for name in kernels for which in ("forward", "backward")
    }
    assert "loss of a chunk" in report["kernels"][-1]["kernel"] and len(report["losses"]) == 2
    cases = {"plain", "mask 3", "mask 5", "slice 9B", "submodel 9B", "slice 6B", "submodel 6B", "teacher"}
    places = {(row["layers"], row["tokens"]) for row in report["cases"]}
    assert len(places) == 4 and len(report["cases"]) == len(places) * len(cases)
    assert {row["case"] for row in report["cases"]} == cases and report["left_out"] == []
    assert all((row["case"] == "teacher") != (row.get("step_s", 0) > 0) for row in report["cases"])
    assert all(row["ms"] > 0 and row["flops"] > 0 for row in [*report["cases"], *report["losses"]])
    assert run.stdout.rstrip().splitlines()[-2].split()[1:4] == ["M-M-M-M-", "48", "teacher"]


def test_what_there_is_no_time_or_memory_for_is_left_out_and_named() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("a mock of a full GPU")

    clock = Clock(torch.device("cpu"), seconds=1000.0, rounds=2)
    assert clock.costs({"small": lambda: None, "large": too_large}, "sizes").keys() == {"small"}
    clock.seconds = 0.0
    assert not clock.costs({"late": lambda: None}, "sizes")
    assert clock.left_out == ["sizes, large: out of memory", "sizes, late: the 0 s are over"]


def test_the_subnets_of_the_gpu_benchmark_have_the_published_widths() -> None:
    shape = gpu_models.model_shape("M-M-M-M*", tiny=False)
    nine, six = (gpu_models.subnet_at(shape, shares) for shares in gpu_models.SUBNETS.values())
    assert (nine.hidden, nine.ffn[0], nine.mamba_heads[0], nine.attention_heads[0]) == (4480, 17408, 112, 32)
    assert (six.hidden, six.ffn[0], six.mamba_heads[0], six.attention_heads[0]) == (4096, 15360, 96, 24)
