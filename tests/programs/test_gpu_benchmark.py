"""The benchmark of `make gpu`, as it runs where there is no GPU."""

import json
from pathlib import Path

from tests.programs.test_start import started


def test_what_a_gpu_measures_runs_in_tiny_on_a_cpu(tmp_path: Path) -> None:
    """Every line of `make gpu`'s benchmark, kernels in Triton's interpreter; a process of its own, for its groups."""
    file = tmp_path / "report" / "gpu.json"
    asked = ["--only=gpu", "--device=cpu", "--tiny", "--rounds=1", f"--json={file}"]
    alone = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # threads would wait in turn
    run = started(tmp_path, "benchmark", *asked, **alone)
    assert run.returncode == 0, run.stderr
    report = json.loads(file.read_text())
    assert all(report[name] > 0 for name in ("matmul_tflops", "copy_tb_per_s", "launch_us")) and report["card"] == "CPU"
    kernels = {"norm", "gated group norm", "squared ReLU", "residual", "convolution"}
    assert {row["kernel"] for row in report["kernels"][:-1]} == {
        f"{name}, {which}" for name in kernels for which in ("forward", "backward")
    }
    assert "loss of a chunk" in report["kernels"][-1]["kernel"] and len(report["losses"]) == 2
    cases = {"plain", "mask 3", "mask 5", "slice 9B", "submodel 9B", "slice 6B", "submodel 6B", "teacher"}
    places = {(row["layers"], row["tokens"]) for row in report["cases"]}
    assert len(places) == 2 and len(report["cases"]) == len(places) * len(cases)
    assert {row["case"] for row in report["cases"]} == cases and report["left_out"] == []
    assert all((row["case"] == "teacher") != (row.get("step_s", 0) > 0) for row in report["cases"])
    assert all(row["ms"] > 0 and row["flops"] > 0 for row in [*report["cases"], *report["losses"]])
    assert run.stdout.rstrip().splitlines()[-2].split()[1:4] == ["M-M-M-M-", "4", "teacher"]
