"""A submodel is exactly the parent's nested part, counted by the cost table, whatever the shape."""

from functools import partial

import pytest
import torch

from elastic.rank.slicing import cut_parameter, submodel_source
from elastic.space.axes import Axis, LayerKind
from elastic.space.cost import shape_cost, subnet_cost
from elastic.space.layers import LAYER_PARAMETERS, LAYERS, MODEL_PARAMETERS, parameter_names
from elastic.space.nesting import Cut, parameter_size
from elastic.space.shape import ModelShape, ShapeError, Subnet, SubnetError
from elastic.space.space import AxisChoices, Space
from tests.nested import submodel_tensors
from tests.shapes import random_choice

LANES = 4


def shape(pattern: str, **changes: int | bool) -> ModelShape:
    sizes: dict[str, int | bool] = {
        "vocab": 24,
        "hidden": 16,
        "ffn": 24,
        "mamba_heads": 8,
        "head_channels": 6,
        "mamba_groups": 2,
        "mamba_state": 4,
        "conv_kernel": 4,
        "attention_heads": 6,
        "kv_heads": 2,
        "attention_channels": 4,
    }
    return ModelShape.uniform(pattern, **(sizes | changes))


SHAPES = {
    "all kinds": shape("M-M*-M-*M"),
    "one group, odd head channels": shape("M-*M-", mamba_groups=1, mamba_heads=3, head_channels=5),
    "four groups, long convolution": shape("MM*-", mamba_groups=4, conv_kernel=7, mamba_state=3),
    "no attention, tied": shape("M-M-", tied_embeddings=True),
    "no Mamba, one KV head": shape("*-*-*", kv_heads=1, attention_heads=5),
    "one layer": shape("M"),
}


def space(parent: ModelShape) -> Space:
    """Give every axis that exists in `parent` its full width and every smaller legal one."""
    steps = {
        Axis.HIDDEN: 5,
        Axis.FFN: LANES,
        Axis.MAMBA_HEAD: parent.mamba_groups,
        Axis.MAMBA_CHANNEL: 1,
        Axis.ATTENTION_HEAD: parent.kv_heads,
        Axis.DEPTH: 1,
    }
    plain = Space(parent, {}, lanes=LANES)
    full = {axis: plain.full_width(axis) for axis in Axis}
    per_layer = {Axis.FFN, Axis.MAMBA_HEAD, Axis.ATTENTION_HEAD}
    return Space(
        parent,
        {
            axis: AxisChoices(tuple(range(full[axis], 0, -steps[axis])), axis in per_layer)
            for axis in Axis
            if full[axis]
        },
        lanes=LANES,
        depth_ranking=tuple(torch.randperm(len(parent.pattern)).tolist()),
    )


def numbered(parent: ModelShape) -> dict[str, torch.Tensor]:
    """Give every value of the parent its own number, so that a value shows where it came from."""
    tensors, start = {}, 0
    for name in parameter_names(parent):
        size = parameter_size(name, parent)
        count = torch.Size(size).numel()
        tensors[name] = torch.arange(start, start + count).view(size)
        start += count
    return tensors


@pytest.mark.parametrize("name", SHAPES)
def test_pitfall_04_06_11_sizes_add_up_to_the_cost(name: str) -> None:
    parent = SHAPES[name]
    tensors = numbered(parent)
    assert sum(tensor.numel() for tensor in tensors.values()) == shape_cost(parent).params
    choices, generator = space(parent), torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(40):
        subnet = choices.subnet(random_choice(choices, generator))
        cut = submodel_tensors(tensors, parent, subnet, LANES)
        assert sum(tensor.numel() for tensor in cut.values()) == subnet_cost(parent, subnet).params
        submodel = subnet.shape(parent)
        assert {key: tuple(tensor.shape) for key, tensor in cut.items()} == {
            key: parameter_size(key, submodel) for key in parameter_names(submodel)
        }
        values = torch.cat([tensor.flatten() for tensor in cut.values()])
        assert values.unique().numel() == values.numel(), "a parent value appears twice"
        seen.add(subnet_cost(parent, subnet).params)
    assert len(seen) > 10, "the draws hardly differ, the test would show little"


@pytest.mark.parametrize("name", SHAPES)
def test_cutting_twice_is_cutting_once(name: str) -> None:
    parent = SHAPES[name]
    tensors, choices, generator = numbered(parent), space(parent), torch.Generator().manual_seed(5)
    for _ in range(10):
        large = choices.subnet(random_choice(choices, generator))
        middle = large.shape(parent)
        small = shrunk(middle, generator)
        twice = submodel_tensors(submodel_tensors(tensors, parent, large, LANES), middle, small, LANES)
        direct = Subnet(
            hidden=small.hidden,
            ffn=spread(parent, large, LayerKind.MLP, small.ffn),
            mamba_heads=spread(parent, large, LayerKind.MAMBA, small.mamba_heads),
            head_channels=small.head_channels,
            attention_heads=spread(parent, large, LayerKind.ATTENTION, small.attention_heads),
            kept_layers=tuple(large.kept_layers[layer] for layer in small.kept_layers),
        )
        once = submodel_tensors(tensors, parent, direct, LANES)
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[key], twice[key]) for key in once)


def shrunk(parent: ModelShape, generator: torch.Generator) -> Subnet:
    """Draw a subnet of a parent whose own layers may differ."""

    def below(width: int, step: int) -> int:
        return step * int(torch.randint(1, width // step + 1, (), generator=generator))

    num_layers = len(parent.pattern)
    order = torch.randperm(num_layers, generator=generator).tolist()
    return Subnet(
        hidden=below(parent.hidden, 1),
        ffn=tuple(below(width, LANES) for width in parent.ffn),
        mamba_heads=tuple(below(width, parent.mamba_groups) for width in parent.mamba_heads),
        head_channels=below(parent.head_channels, 1),
        attention_heads=tuple(below(width, parent.kv_heads) for width in parent.attention_heads),
        kept_layers=tuple(sorted(order[: below(num_layers, 1)])),
    )


def spread(parent: ModelShape, outer: Subnet, kind: LayerKind, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Put the widths of a submodel's layers back at the parent's layers; skipped layers get their outer width."""
    given = iter(widths)
    return tuple(
        next(given) if layer in outer.kept_layers else outer.width(parent, layer)
        for layer in parent.pattern.layers_of(kind)
    )


def test_kept_rows_follow_the_layout_written_out_by_hand() -> None:
    parent = shape("M-*", hidden=4, ffn=8, mamba_heads=4, head_channels=2, mamba_state=1)
    subnet = Subnet(hidden=3, ffn=(4,), mamba_heads=(2,), head_channels=1, attention_heads=(4,), kept_layers=(0, 1, 2))
    rows = {
        name: torch.arange(tensor.shape[0]).expand(*reversed(tensor.shape)).permute(*range(tensor.dim() - 1, -1, -1))
        for name, tensor in numbered(parent).items()
    }
    cut = {
        name: tensor.reshape(tensor.shape[0], -1)[:, 0].tolist()
        for name, tensor in submodel_tensors(rows, parent, subnet, lanes=2).items()
    }
    # 2 lanes of 4 neurons keep 2 each.
    assert cut["decoder.layers.1.mlp.linear_fc1.weight"] == [0, 1, 4, 5]
    # 2 groups x 2 heads x 2 channels keep 1 head of each group and 1 channel: z 0, 4; x 8, 12; B, C, then dt 0, 2.
    assert cut["decoder.layers.0.mixer.in_proj.weight"] == [0, 4, 8, 12, 16, 17, 18, 19, 20, 22]
    assert cut["decoder.layers.0.mixer.conv1d_weight"] == [0, 4, 8, 9, 10, 11]
    assert cut["decoder.layers.0.mixer.A_log"] == [0, 2]
    # 2 KV groups of (3 queries, k, v) x 4 channels keep 2 queries.
    group = [*range(8), *range(12, 20)]
    assert cut["decoder.layers.2.self_attention.linear_qkv.weight"] == group + [row + 20 for row in group]
    assert cut["decoder.layers.2.self_attention.linear_proj.weight"] == [0, 1, 2]


def test_kept_layers_are_numbered_anew() -> None:
    parent = SHAPES["all kinds"]
    tensors = numbered(parent)
    full = Subnet.full(parent)
    subnet = Subnet(**(vars(full) | {"kept_layers": (1, 3, 8)}))
    cut = submodel_tensors(tensors, parent, subnet, LANES)
    for new, old in enumerate(subnet.kept_layers):
        for rest in LAYERS[parent.pattern.kinds[old]].parameters:
            assert torch.equal(cut[f"decoder.layers.{new}.{rest}"], tensors[f"decoder.layers.{old}.{rest}"])
    assert not any(name.startswith("decoder.layers.3.") for name in cut)


def test_a_submodel_does_not_share_memory_and_keeps_gradients() -> None:
    parent = SHAPES["all kinds"]
    tensors = {name: tensor.double().requires_grad_() for name, tensor in numbered(parent).items()}
    subnet = Subnet(**(vars(Subnet.full(parent)) | {"hidden": 7}))
    cut = submodel_tensors(tensors, parent, subnet, LANES)
    name = "embedding.word_embeddings.weight"
    assert cut[name].untyped_storage().nbytes() == cut[name].numel() * 8
    cut[name].sum().backward()
    gradient = tensors[name].grad
    assert gradient is not None and gradient[:, :7].eq(1).all() and gradient[:, 7:].eq(0).all()


def test_a_function_source_is_asked_only_for_what_is_needed() -> None:
    parent, asked = SHAPES["all kinds"], []
    tensors = numbered(parent)

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    subnet = Subnet(**(vars(Subnet.full(parent)) | {"kept_layers": (2,)}))
    source = submodel_source(read, parent, subnet, LANES)
    assert asked == []
    source("decoder.layers.0.mixer.D")
    assert asked == ["decoder.layers.2.mixer.D"]


def test_every_named_parameter_belongs_to_one_kind() -> None:
    by_kind = [name for kind in LayerKind for name in LAYERS[kind].parameters]
    assert sorted(by_kind) == sorted(LAYER_PARAMETERS)
    parent = shape("M-*")
    names = {name.split(".", 3)[3] if name.startswith("decoder.layers") else name for name in parameter_names(parent)}
    assert names == LAYER_PARAMETERS.keys() | MODEL_PARAMETERS.keys()


def test_illegal_subnets_are_refused_before_anything_is_read() -> None:
    parent = SHAPES["all kinds"]
    full = vars(Subnet.full(parent))

    def read(name: str) -> torch.Tensor:
        raise AssertionError("read")

    with pytest.raises(SubnetError, match="ffn = 22 of layer 1 must be a multiple of lanes = 4; nearest legal is 24"):
        submodel_source(read, parent, Subnet(**(full | {"ffn": (22, 24, 24)})), LANES)
    with pytest.raises(SubnetError, match="hidden = 17"):
        submodel_source(read, parent, Subnet(**(full | {"hidden": 17})), LANES)
    with pytest.raises(ShapeError, match="mamba_heads = 7"):
        submodel_source(read, parent, Subnet(**(full | {"mamba_heads": (7, 8, 8, 8)})), LANES)


def test_a_tensor_of_the_wrong_size_is_named() -> None:
    parent = SHAPES["all kinds"]
    tensors = numbered(parent) | {"decoder.layers.0.mixer.D": torch.zeros(9)}
    subnet = Subnet(**(vars(Subnet.full(parent)) | {"mamba_heads": (4, 4, 4, 4)}))
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mixer\.D: dimension 0 has 9 rows"):
        submodel_tensors(tensors, parent, subnet, LANES)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layer_index, rest", [(1, "mlp.linear_fc1.weight"), (3, "self_attention.linear_qkv.weight")])
def test_pitfall_19_cut_shards_are_shards_of_the_cut(ranks: int, layer_index: int, rest: str) -> None:
    parent = shape("M-M*", kv_heads=4, attention_heads=12)
    subnet = Subnet(**(vars(Subnet.full(parent)) | {"ffn": (8,), "attention_heads": (4,), "hidden": 9}))
    name = f"decoder.layers.{layer_index}.{rest}"
    whole = numbered(parent)[name]
    of_layer = partial(Cut.of_layer, parent, layer_index, subnet.layer_widths(parent, layer_index), lanes=LANES)
    cut = cut_parameter(whole, name, of_layer())
    shards = [cut_parameter(shard, name, of_layer(tensor_parallel=ranks)) for shard in whole.chunk(ranks)]
    assert torch.equal(torch.cat(shards), cut)
    assert cut.shape[0] < whole.shape[0] and cut.shape[1] == 9
