"""What the smoke chain shows: a skipped layer is shown as skipped, whatever width the router had for it."""

from pathlib import Path
from typing import Any

import pytest

from elastic.space.axes import Axis
from elastic.space.space import AxisChoices, Space
from recipes._smoke_report import draw_family, layer_widths, summary_table
from tests.shapes import UNEVEN

SPACE = Space(UNEVEN, {Axis.FFN: AxisChoices((32, 16), per_layer=True), Axis.DEPTH: AxisChoices((5, 4))})


@pytest.fixture
def summary() -> dict[str, Any]:
    """Two members, one of them without the layer at index 1, whose width the router had chosen all the same."""
    rows = []
    for name, loss, chosen in (("full", 2.0, 0), ("small", 2.5, 1)):
        subnet = SPACE.subnet({Axis.FFN: (chosen, 0), Axis.DEPTH: (chosen,)}).__dict__ | {
            "kept_layers": (0, 1, 2, 3, 4) if name == "full" else (0, 2, 3, 4)
        }
        rows.append(
            {
                "name": name, "params": 1000, "target_ratio": 1.0, "loss_subnet": loss, "loss_submodel": loss,
                "loss_hugging_face": loss, "loss_pruned_untrained": loss + 1, "gain_over_untrained": 1.0,
                "subnet": subnet, "layers": layer_widths(UNEVEN, subnet),
            }
        )  # fmt: skip
    return {"parent": {"params": 1000, "loss_subnet": 2.2}, "family": rows}


def test_a_skipped_layer_has_no_width(summary: dict[str, Any]) -> None:
    full, small = (row["layers"] for row in summary["family"])
    assert [(layer["kind"], layer["width"]) for layer in full] == [("M", 8), ("-", 32), ("*", 6), ("M", 8), ("-", 32)]
    assert [layer["width"] for layer in small] == [8, None, 6, 8, 32]
    assert [layer["parent_width"] for layer in small] == [8, 32, 6, 8, 32]


def test_picture_and_table_have_every_member(summary: dict[str, Any], tmp_path: Path) -> None:
    draw_family(summary, tmp_path / "family.png")
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")
    assert list(summary_table(summary).columns[0].cells) == ["parent", "full", "small"]
