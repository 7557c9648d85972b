"""evaluate execution=mask runs the subnet it was given, or none."""

import pytest
import torch

from elastic.config.verbs import SubnetConfig
from elastic.space.axes import Axis
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import AxisChoices, Space
from elastic.verbs.members import MembersError, one_hot_weights

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
