"""Every bad config of the tables gets its own line, before any process group."""

import pytest
import torch

from elastic.config.rules_layout import Cluster
from elastic.model.backends import ATTENTION
from tests.unit.config.bad_configs import family, fields, generate, layout, verbs
from tests.unit.config.configs import BadConfig, ProblemsOf, found, values_of


def name(row: BadConfig) -> str:
    """Name a row after its verb and field."""
    kind, _, _, line = row
    return f"{kind.__name__}-{line.partition(' = ')[0]}"


@pytest.mark.parametrize("row", [*fields.BAD, *layout.BAD, *family.BAD, *verbs.BAD], ids=name)
def test_bad_config_gets_one_line_with_field_value_rule_and_remedy(problems_of: ProblemsOf, row: BadConfig) -> None:
    kind, changes, num_processes, line = row
    assert problems_of(kind, changes, num_processes) == [line]


@pytest.mark.parametrize("row", generate.BAD, ids=name)
def test_bad_config_of_text_generation_gets_one_line(row: BadConfig) -> None:
    """Without the files, where a checkpoint that writes text needs a tokenizer and budgets (test_config_files.py)."""
    kind, changes, num_processes, line = row
    _, problems = found(kind, values_of(kind, changes), Cluster(num_processes))
    assert [str(problem) for problem in problems] == [line]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("row", layout.BAD_ON_GPUS, ids=name)
def test_bad_config_on_gpus_gets_one_line(row: BadConfig) -> None:
    kind, changes, num_processes, line = row
    missing = {ATTENTION.name: (ATTENTION.package, ATTENTION.instead)}
    _, problems = found(kind, values_of(kind, changes), Cluster(num_processes, has_gpu=True, missing=missing))
    assert [str(problem) for problem in problems] == [line]
