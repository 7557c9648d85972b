"""evaluate execution=mask runs the subnet it was given, or none; its table, with sources too, loses no digit."""

import io

import pytest
import torch
from rich.console import Console

from elastic.config.inputs import SubnetConfig
from elastic.space.axes import Axis
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import AxisChoices, Space
from elastic.verbs.evaluate import evaluation_table
from elastic.verbs.members import MembersError, one_hot_weights
from elastic.verbs.report_file import print_table

PARENT = ModelShape.uniform(
    "M-*M-", hidden=32, ffn=64, mamba_heads=4, head_channels=8, mamba_groups=2, mamba_state=16, conv_kernel=4,
    attention_heads=4, kv_heads=2, attention_channels=16, vocab=64,
)  # fmt: skip
SPACE = Space(
    PARENT,
    {
        Axis.HIDDEN: AxisChoices((32, 16)),
        Axis.FFN: AxisChoices((64, 32)),
        Axis.MAMBA_HEAD: AxisChoices((4, 2), per_layer=True),
        Axis.DEPTH: AxisChoices((5, 4, 3)),
    },
    depth_ranking=(3, 0, 1, 2, 4),
)


def given(**values: object) -> Subnet:
    return SubnetConfig(name="given", **values).subnet(PARENT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(hidden=16, mamba_heads=(4, 2)),
        dict(ffn=(32,), kept_layers=(0, 1, 3)),
        dict(ffn=(32, 64), kept_layers=(0, 1, 2, 3)),  # the width of the layer that leaves says nothing
    ],
)
def test_a_subnet_of_the_space_has_weights_that_choose_it(values: dict[str, object]) -> None:
    subnet = given(**values)
    weights = one_hot_weights(subnet, SPACE)
    assert all(torch.equal(leaf.sum(-1), torch.ones(leaf.shape[0])) for leaf in weights.values())
    chosen = SPACE.subnet({axis: tuple(leaf.argmax(-1).tolist()) for axis, leaf in weights.items()})
    assert chosen.kept_layers == subnet.kept_layers and chosen.shape(PARENT) == subnet.shape(PARENT)


@pytest.mark.parametrize(
    ("values", "space"),
    [
        (dict(hidden=24), SPACE),
        (dict(kept_layers=(0, 1, 2)), SPACE),  # three layers, but not the three best
        (dict(ffn=(64, 32)), SPACE),  # one choice for all layers
        (dict(attention_heads=(2,)), SPACE),  # an axis without a choice
        (dict(hidden=16), Space(PARENT, {})),
    ],
)
def test_any_other_subnet_is_refused(values: dict[str, object], space: Space) -> None:
    with pytest.raises(MembersError, match='execution = "mask": '):
        one_hot_weights(given(**values), space)


def test_a_table_of_many_sources_is_whole_on_a_narrow_screen() -> None:
    screen, losses = io.StringIO(), {f"source{number}": 1.0 + number / 10000 for number in range(9)}
    row = dict(
        name="small",
        metric="params",
        target=1e9,
        cost_ratio=1.0,
        params=1e9,
        loss=1.5,
        perplexity=4.5,
        deploy_bytes=1e9,
    )
    print_table(evaluation_table([{**row, "loss_by_source": losses}]), Console(file=screen, width=80))
    assert all(f" {loss:.4f} " in screen.getvalue() for loss in losses.values()) and "\u2026" not in screen.getvalue()
