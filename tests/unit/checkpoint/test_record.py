"""What a checkpoint's record says of a family comes back, of one that was written before tolerances, too."""

import json
from pathlib import Path

import pytest

from elastic.checkpoint.record import RECORD_FILE, Family, Record
from elastic.space.cost import Budget, Deployment
from tests.shapes import UNEVEN

BUDGETS = (Budget("full", target=2e6), Budget("small", target=1e6, tolerance=0.005))


@pytest.mark.parametrize("stated", [True, False])
def test_tolerances_come_back_and_what_was_kept_before_them_is_kept(tmp_path: Path, stated: bool) -> None:
    """A router's choice within 2% of its budget stood, and the weights were trained with it."""
    record = Record("elastic", UNEVEN, family=Family({}, BUDGETS, Deployment(), router_width=8))
    record.write(tmp_path)
    if not stated:
        content = json.loads((tmp_path / RECORD_FILE).read_text())
        for budget in content["family"]["budgets"]:
            del budget["tolerance"]
        (tmp_path / RECORD_FILE).write_text(json.dumps(content))
    family = Record.read(tmp_path).family
    assert family is not None
    assert [one.tolerance for one in family.budgets] == ([0.01, 0.005] if stated else [0.02, 0.02])
    assert [one.limit for one in family.budgets] == [2e6, 1e6]
