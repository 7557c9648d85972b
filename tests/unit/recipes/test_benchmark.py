"""The benchmark leaves out what a machine cannot time, and says so in its table."""

import pytest
import torch

from recipes.benchmark import execution_table
from recipes.benchmarks import _precisions
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
