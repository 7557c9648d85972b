"""The benchmark leaves out what a machine cannot time, and says so in its table."""

import subprocess
import sys

import pytest
import torch

from recipes.benchmark import execution_table
from recipes.benchmarks import _precisions, gpu_models
from recipes.benchmarks._clock import Clock
from recipes.benchmarks._precisions import MAX_SLOWDOWN, bf16_slowdown, timed_precisions
from recipes.benchmarks.memory import peak_resident_bytes, resident_bytes


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


def test_a_childs_peak_is_its_own_and_not_that_of_the_process_that_started_it() -> None:
    here = torch.ones(100 << 20, dtype=torch.uint8)  # beside what torch takes
    assert resident_bytes("VmHWM") > 300 << 20
    child = subprocess.Popen([sys.executable, "-c", "import time; taken = b'x' * (60 << 20); time.sleep(1)"])
    assert 60 << 20 < peak_resident_bytes(child) < 200 << 20
    assert here.numel() and child.returncode == 0
