"""The vocabulary: layer patterns, model shapes, axes and their choices, subnets, and what each of them refuses."""

import itertools
from dataclasses import replace

import pytest
import torch

from elastic.space.axes import Axis, LayerKind
from elastic.space.cost import Widths
from elastic.space.reach import smallest_subnet
from elastic.space.shape import LayerPattern, ModelShape, PatternError, ShapeError, Subnet, SubnetError
from elastic.space.space import AxisChoices, Space, SpaceError
from tests.shapes import random_choice

# Pattern, layers, Mamba, FFN, attention: Nemotron Nano v2 12B and 9B, Nemotron 3 Nano 4B, Nemotron-H 8B and 47B.
PUBLISHED = [
    ("M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", 62, 28, 28, 6),
    ("M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 56, 27, 25, 4),
    ("M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", 42, 21, 17, 4),
    ("M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", 52, 24, 24, 4),
    (
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        98, 45, 48, 5,
    ),
]  # fmt: skip


def shape(pattern: str = "M-M*-M-", **changes: int) -> ModelShape:
    sizes = dict(
        vocab=64, hidden=16, ffn=32, mamba_heads=8, head_channels=6, mamba_groups=2, mamba_state=4, conv_kernel=4,
        attention_heads=6, kv_heads=2, attention_channels=4,
    )  # fmt: skip
    return ModelShape.uniform(pattern, **(sizes | changes))


@pytest.mark.parametrize(("text", "layers", "mamba", "ffn", "attention"), PUBLISHED)
def test_pitfall_05_one_parser_reads_every_published_pattern(
    text: str, layers: int, mamba: int, ffn: int, attention: int
) -> None:
    pattern = LayerPattern.parse(text)
    counts = [len(pattern.layers_of(kind)) for kind in (LayerKind.MAMBA, LayerKind.MLP, LayerKind.ATTENTION)]
    assert (len(pattern), *counts) == (layers, mamba, ffn, attention)
    assert str(pattern) == text and LayerPattern.parse(str(pattern)) == pattern


def test_pipeline_boundaries_are_no_layers() -> None:
    pattern = LayerPattern.parse("M-|M*|-")
    assert (str(pattern), len(pattern), pattern.segments) == ("M-M*-", 5, (2, 2, 1))
    assert pattern.layers_of(LayerKind.MLP) == (1, 4)
    assert [pattern.ordinal(index) for index in range(5)] == [0, 0, 1, 0, 1]
    assert str(pattern.select((1, 2, 3))) == "-M*" and pattern.select((1, 2, 3)).segments == (3,)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ME-", "'E' at position 1"), ("M m", "' ' at position 1"), ("", "empty"), ("M||-", "empty"), ("|M", "empty")],
)
def test_unreadable_patterns_are_refused(text: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        LayerPattern.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": (32, 32)}, "ffn has 2 widths for 3 MLP layers"),
        ({"hidden": 0}, "hidden = 0"),
        ({"ffn": (32, 0, 32)}, "ffn = .* at least 1"),
        ({"mamba_heads": (8, 7, 8)}, "mamba_heads = 7 is not a multiple of mamba_groups = 2"),
        ({"attention_heads": (5,)}, "attention_heads = 5 is not a multiple of kv_heads = 2"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(shape(), **changes)  # type: ignore[arg-type]


def test_shape_problems_come_in_one_error() -> None:
    with pytest.raises(ShapeError) as caught:
        replace(shape(), hidden=0, vocab=-1, attention_heads=(5,))
    assert all(name in str(caught.value) for name in ("hidden", "vocab", "attention_heads"))


def test_width_of_each_layer() -> None:
    own = replace(shape(), ffn=(32, 24, 16), mamba_heads=(8, 4, 2))
    assert [own.width(index) for index in range(7)] == [8, 32, 4, 6, 24, 2, 16]
    assert own.with_vocab(99).vocab == 99 and own.with_vocab(64) == own


AXES = {
    Axis.HIDDEN: AxisChoices((16, 12, 7)),
    Axis.FFN: AxisChoices((32, 16), per_layer=True),
    Axis.MAMBA_HEAD: AxisChoices((8, 4), per_layer=True),
    Axis.MAMBA_CHANNEL: AxisChoices((6, 5)),
    Axis.ATTENTION_HEAD: AxisChoices((6, 2)),
    Axis.DEPTH: AxisChoices((7, 4)),
}


@pytest.mark.parametrize(
    ("axis", "choices", "message"),
    [
        (Axis.HIDDEN, AxisChoices((7, 12, 16)), "first choice is 7, it must be the full width 16"),
        (Axis.HIDDEN, AxisChoices((16, 7, 12)), "strictly descending"),
        (Axis.HIDDEN, AxisChoices((16, 16)), "strictly descending"),
        (Axis.HIDDEN, AxisChoices((12, 7)), "must be the full width 16"),
        (Axis.HIDDEN, AxisChoices((16, 0)), r"choice 0 is outside 1\.\.16"),
        (Axis.HIDDEN, AxisChoices((20, 16)), r"choice 20 is outside"),
        (Axis.HIDDEN, AxisChoices(()), "no choices"),
        (Axis.DEPTH, AxisChoices((7, 8)), r"outside 1\.\.7"),
        (Axis.FFN, AxisChoices((32, 20)), "multiple of 8, nearest legal is 16"),
        (Axis.FFN, AxisChoices((32, 3)), "nearest legal is 8"),
        (Axis.MAMBA_HEAD, AxisChoices((8, 3)), "multiple of 2"),
        (Axis.ATTENTION_HEAD, AxisChoices((6, 3)), "multiple of 2"),
        (Axis.DEPTH, AxisChoices((7, 4), per_layer=True), "per_layer is not allowed"),
        (Axis.MAMBA_CHANNEL, AxisChoices((6, 5), per_layer=True), "per_layer is not allowed"),
    ],
)
def test_pitfall_21_choices_must_be_descending_full_first_and_legal(
    axis: Axis, choices: AxisChoices, message: str
) -> None:
    with pytest.raises(SpaceError, match=f"{axis}: .*{message}"):
        Space(shape(), {axis: choices})


def test_space_problems_come_in_one_error() -> None:
    with pytest.raises(SpaceError) as caught:
        Space(
            shape(ffn=20), {Axis.HIDDEN: AxisChoices((7, 16)), Axis.DEPTH: AxisChoices((9,))}, depth_ranking=(0, 0, 1)
        )
    message = str(caught.value)
    assert all(part in message for part in ("hidden", "depth:", "multiples of lanes = 8", "depth_ranking"))


def test_an_axis_whose_layers_differ_in_the_parent_cannot_be_elastic() -> None:
    uneven = replace(shape(), ffn=(32, 24, 16))
    assert Space(uneven, {}).subnet({}) == Subnet.full(uneven)
    with pytest.raises(SpaceError, match="ffn: the parent's own widths differ"):
        Space(uneven, {Axis.FFN: AxisChoices((32, 16))})


def test_an_axis_that_is_not_named_stays_full() -> None:
    space = Space(shape(), {})
    assert space.elastic_axes() == () and set(space.axes) == set(Axis)
    assert space.subnet({}) == Subnet.full(space.parent) and space.subnet({}).shape(space.parent) == space.parent


@pytest.mark.parametrize("pattern", ["M", "-", "*", "M-", "*-", "MM*"])
def test_pitfall_11_absent_layer_kinds(pattern: str) -> None:
    """An axis without layers has width 0, nothing to choose, and no slot; nothing divides by it."""
    space = Space(shape(pattern), {Axis.HIDDEN: AxisChoices((16, 8))})
    for axis, kind in ((Axis.FFN, "-"), (Axis.MAMBA_HEAD, "M"), (Axis.ATTENTION_HEAD, "*")):
        assert (space.full_width(axis) == 0) == (kind not in pattern)
        assert axis not in space.elastic_axes()
    subnet = space.subnet({Axis.HIDDEN: (1,)})
    assert subnet.hidden == 8 and str(subnet.shape(space.parent).pattern) == pattern
    per_layer = Space(shape(pattern), {Axis.FFN: AxisChoices((32, 16) if "-" in pattern else (0,), per_layer=True)})
    assert per_layer.num_slots(Axis.FFN) == pattern.count("-")
    with pytest.raises(SpaceError, match=r"outside 0\.\.0|first choice"):
        Space(shape("M" if pattern == "-" else pattern.replace("-", "M")), {Axis.FFN: AxisChoices((32, 16))})


def test_choice_indices_become_widths() -> None:
    space = Space(shape(), AXES, depth_ranking=(6, 0, 3, 1, 2, 4, 5))
    chosen = {Axis.HIDDEN: (2,), Axis.FFN: (0, 1, 0), Axis.MAMBA_HEAD: (1, 0, 1), Axis.DEPTH: (1,)}
    subnet = space.subnet(chosen)
    assert subnet == Subnet(7, (32, 16, 32), (4, 8, 4), 6, (6,), (0, 1, 3, 6))
    assert [space.num_slots(axis) for axis in Axis] == [1, 3, 3, 1, 1, 1]
    assert [space.slot(Axis.FFN, n) for n in range(3)] == [0, 1, 2]
    assert [space.slot(Axis.ATTENTION_HEAD, n) for n in range(3)] == [0, 0, 0]
    assert space.elastic_axes() == tuple(Axis)


def test_submodel_shape_keeps_the_widths_of_the_kept_layers_only() -> None:
    parent = shape()
    subnet = Subnet(7, (32, 16, 8), (4, 8, 2), 5, (2,), (0, 1, 3, 6))
    cut = subnet.shape(parent)
    assert (str(cut.pattern), cut.hidden, cut.head_channels) == ("M-*-", 7, 5)
    assert (cut.ffn, cut.mamba_heads, cut.attention_heads) == ((32, 8), (4,), (2,))
    assert (cut.vocab, cut.mamba_groups, cut.kv_heads, cut.conv_kernel) == (64, 2, 2, 4)
    assert subnet.shape(parent).ffn == (32, 8)
    assert [subnet.width(parent, index) for index in range(7)] == [4, 32, 8, 2, 16, 2, 8]


def test_depth_keeps_the_best_ranked_layers_in_their_original_order() -> None:
    space = Space(shape(), AXES, depth_ranking=(6, 0, 3, 1, 2, 4, 5))
    kept = [space.kept_layers(depth) for depth in range(1, 8)]
    assert kept[0] == (6,) and kept[2] == (0, 3, 6) and kept[6] == tuple(range(7))
    assert all(set(fewer) < set(more) for fewer, more in itertools.pairwise(kept))


def test_layers_that_must_stay_stay_at_every_depth_in_masks_slices_and_cost_alike() -> None:
    """`M-M*-M-` keeps one attention layer (3) ranked last; where the ranking keeps it anyway, nothing changes."""
    plain = Space(shape(), AXES, depth_ranking=(6, 0, 1, 2, 4, 5, 3))
    ruled = replace(plain, keep_at_least={"attention": 1})
    assert [ruled.kept_layers(depth) for depth in (1, 2, 4, 7)] == [(3,), (3, 6), (0, 1, 3, 6), tuple(range(7))]
    assert all(set(ruled.kept_layers(n)) < set(ruled.kept_layers(n + 1)) for n in range(1, 7))
    depths = ruled.axes[Axis.DEPTH].choices
    for row, depth in enumerate(depths):
        sliced = ruled.subnet({Axis.DEPTH: (row,)})
        one_hot = torch.nn.functional.one_hot(torch.tensor([row]), len(depths)).float()
        kept = [layer for layer, keep in enumerate(Widths.expected(ruled, {Axis.DEPTH: one_hot}).keep) if keep == 1]
        assert tuple(kept) == sliced.kept_layers == ruled.kept_layers(depth) and 3 in kept
        assert "*" in str(sliced.shape(ruled.parent).pattern)
    assert "*" in str(smallest_subnet(ruled).shape(ruled.parent).pattern)
    assert "*" not in str(smallest_subnet(plain).shape(plain.parent).pattern)
    kept_anyway = replace(plain, depth_ranking=(6, 0, 3, 1, 2, 4, 5))
    for depth in range(3, 8):
        assert replace(kept_anyway, keep_at_least={"attention": 1}).kept_layers(depth) == kept_anyway.kept_layers(depth)
    assert replace(plain, keep_at_least={"mlp": 2, "attention": 9}).kept_layers(3) == (1, 3, 6)
    no_attention = Space(shape("M-M-"), {}, keep_at_least={"attention": 1})
    assert no_attention.kept_layers(2) == (0, 1)
    with pytest.raises(SpaceError, match=r"depth: choice 2 is below the 3 layers of keep_at_least"):
        Space(shape(), {Axis.DEPTH: AxisChoices((7, 2))}, keep_at_least={"mlp": 3})


FULL = Subnet.full(shape())


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (replace(FULL, hidden=17), r"hidden = 17 is not within 1\.\.16"),
        (replace(FULL, head_channels=0), "head_channels = 0"),
        (replace(FULL, ffn=(32, 40, 32)), "ffn = "),
        (replace(FULL, ffn=(32, 32)), "ffn has 2 widths, the parent has 3 MLP layers"),
        (replace(FULL, mamba_heads=(8, 0, 8)), "mamba_heads = "),
        (replace(FULL, kept_layers=()), "kept_layers"),
        (replace(FULL, kept_layers=(1, 0)), "ascending"),
        (replace(FULL, kept_layers=(0, 0)), "ascending"),
        (replace(FULL, kept_layers=(0, 7)), "below 7"),
        (replace(FULL, kept_layers=(-1, 0)), "below 7"),
    ],
)
def test_subnets_that_do_not_fit_are_refused(subnet: Subnet, message: str) -> None:
    with pytest.raises(SubnetError, match=message):
        subnet.shape(shape())


@pytest.mark.parametrize("changes", [{"mamba_heads": (7, 8, 8)}, {"attention_heads": (3,)}])
def test_pitfall_19_groups_must_keep_equally_many_heads(changes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match="is not a multiple of"):
        replace(FULL, **changes).shape(shape())  # type: ignore[arg-type]


def test_random_choices_reach_every_width_of_every_slot() -> None:
    space, seen = Space(shape(), AXES), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        choice = random_choice(space, generator)
        seen |= {(axis, slot, index) for axis in Axis for slot, index in enumerate(choice[axis])}
        space.subnet(choice).shape(space.parent)
    assert len(seen) == sum(space.num_slots(axis) * len(space.axes[axis].choices) for axis in Axis)
