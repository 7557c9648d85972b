"""Gates become masks, divisors and cuts, once per micro-batch; what does not fit is refused."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elastic.model.elementwise import TorchElementwise
from elastic.model.masks import GatesError, LayerGates, Masks, Width
from elastic.space.axes import INNER_AXIS, Axis, LayerKind
from elastic.space.gates import Execution, Gates
from elastic.space.layers import DimKind
from elastic.space.nesting import kept_indices
from elastic.space.shape import ModelShape, ShapeError, Subnet, SubnetError
from elastic.space.space import AxisChoices, Space
from tests.shapes import random_choice

SHAPE = ModelShape.uniform(
    "M-M*-", vocab=40, hidden=16, ffn=32, mamba_heads=8, head_channels=6, mamba_groups=2, mamba_state=4,
    conv_kernel=4, attention_heads=8, kv_heads=4, attention_channels=4,
)  # fmt: skip
SPACE = Space(
    SHAPE,
    {
        Axis.HIDDEN: AxisChoices((16, 12, 7)),
        Axis.FFN: AxisChoices((32, 16, 8), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((8, 4), per_layer=True),
        Axis.MAMBA_CHANNEL: AxisChoices((6, 5)),
        Axis.ATTENTION_HEAD: AxisChoices((8, 4)),
        Axis.DEPTH: AxisChoices((5, 3)),
    },
    lanes=4,
    depth_ranking=(4, 0, 3, 1, 2),
)
ALL_LAYERS = tuple(range(5))


def inner(gates: LayerGates, layer_index: int) -> Width:
    return gates[INNER_AXIS[SHAPE.pattern.kinds[layer_index]]]


INNER_KIND = {LayerKind.MAMBA: DimKind.MAMBA_HEAD, LayerKind.MLP: DimKind.FFN, LayerKind.ATTENTION: DimKind.CONTEXT}


def masks(layers: tuple[int, ...] = ALL_LAYERS, tensor_parallel: int = 1, space: Space = SPACE) -> Masks:
    return Masks(space, layers, tensor_parallel, torch.device("cpu"))


def soft(seed: int = 0) -> dict[Axis, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        axis: torch.rand(SPACE.num_slots(axis), len(SPACE.axes[axis].choices), generator=generator).requires_grad_()
        for axis in Axis
    }


def one_hot(choice: dict[Axis, tuple[int, ...]]) -> dict[Axis, Tensor]:
    return {
        axis: torch.nn.functional.one_hot(torch.tensor(choice[axis]), len(SPACE.axes[axis].choices)).float()
        for axis in Axis
    }


def test_a_hard_choice_gives_exact_masks_that_keep_what_a_slice_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        choice = random_choice(SPACE, generator)
        subnet = SPACE.subnet(choice)
        mask, cut = masks().layers(Gates.mask(one_hot(choice))), masks().layers(Gates.slice(subnet))
        assert cut[0].cut.grid(DimKind.HIDDEN).kept_size == subnet.hidden == int(mask[0].hidden.active)
        assert cut[0].hidden.vector is None
        for index, (masked, sliced) in enumerate(zip(mask, cut, strict=True)):
            kind = SHAPE.pattern.kinds[index]
            assert inner(masked, index).vector is not None and inner(sliced, index).vector is None
            assert set(inner(masked, index).vector.tolist()) <= {0.0, 1.0}
            kept = kept_indices(sliced.cut.grid(INNER_KIND[kind]))
            if kind is LayerKind.ATTENTION:  # rows of a head to heads
                kept = kept[:: SHAPE.attention_channels] // SHAPE.attention_channels
            assert inner(masked, index).vector.nonzero().flatten().tolist() == kept.tolist()
            assert inner(masked, index).active == inner(sliced, index).active == subnet.width(SHAPE, index)
            if kind is LayerKind.MAMBA:
                channels = [gates[Axis.MAMBA_CHANNEL].active for gates in (masked, sliced)]
                assert channels == [subnet.head_channels] * 2
            assert masked.depth is not None and float(masked.depth) == float(not sliced.skipped)
            assert sliced.skipped == (index not in subnet.kept_layers) and not masked.skipped
            assert all(masked.cut.grid(d).is_whole for d in DimKind)


def test_a_soft_gate_mixes_masks_and_widths_alike() -> None:
    """mask = sum_k w_k I_k and its sum over channels is the divisor (eq. 51), also if the weights do not add to 1."""
    weights = soft()
    layers = masks().layers(Gates.mask(weights))
    for gate in (gate for layer in layers for gate in layer.widths.values()):
        assert gate.vector is not None and isinstance(gate.active, Tensor)
        torch.testing.assert_close(gate.active, gate.vector.sum())
    hidden = weights[Axis.HIDDEN][0]
    assert layers[0].hidden.vector is not None
    assert torch.equal(layers[0].hidden.vector[7:12], (hidden[0] + hidden[1]).expand(5))
    slots = [layers[index][Axis.FFN].vector for index in SHAPE.pattern.layers_of(LayerKind.MLP)]
    assert not torch.equal(*slots), "each FFN layer has its own slot"
    kept_at_3 = {0, 3, 4}
    for index, layer in enumerate(layers):
        depth = weights[Axis.DEPTH][0]
        torch.testing.assert_close(layer.depth, depth[0] + (depth[1] if index in kept_at_3 else 0.0))


@pytest.mark.parametrize("tensor_parallel", [2, 4])
def test_pitfall_19_masks_of_the_ranks_are_the_shards_of_one_mask(tensor_parallel: int) -> None:
    """Every rank holds whole lanes, groups and KV heads, so all ranks have the same rows; divisors stay global."""
    space = replace(SPACE, parent=replace(SHAPE, mamba_groups=4))
    weights = soft(1)
    whole = masks(space=space).layers(Gates.mask(weights))
    shard = masks(tensor_parallel=tensor_parallel, space=space).layers(Gates.mask(weights))
    for index, (one, other) in enumerate(zip(whole, shard, strict=True)):
        own, part = inner(one, index), inner(other, index)
        assert own.vector is not None and part.vector is not None
        assert torch.equal(part.vector.repeat(tensor_parallel), own.vector)
        assert torch.equal(own.active, part.active)  # type: ignore[arg-type]
        for axis in {Axis.MAMBA_CHANNEL} & one.widths.keys():
            assert torch.equal(one[axis].vector, other[axis].vector)  # type: ignore[arg-type]
    assert torch.equal(whole[0].hidden.vector, shard[0].hidden.vector)  # type: ignore[arg-type]


def test_pitfall_22_a_stage_resolves_its_layers_by_their_global_index() -> None:
    weights = soft(2)
    everything = masks().layers(Gates.mask(weights))
    late = masks(layers=(2, 3, 4)).layers(Gates.mask(weights))
    for index, one, other in zip((2, 3, 4), everything[2:], late, strict=True):
        assert torch.equal(inner(one, index).vector, inner(other, index).vector)  # type: ignore[arg-type]
        assert torch.equal(one.depth, other.depth)  # type: ignore[arg-type]
    subnet = SPACE.subnet({Axis.FFN: (0, 2), Axis.MAMBA_HEAD: (0, 1), Axis.DEPTH: (1,)})
    cuts = masks(layers=(2, 3, 4)).layers(Gates.slice(subnet))
    assert [layer.skipped for layer in cuts] == [True, False, False]
    assert (Axis.MAMBA_HEAD, 8, 4) in cuts[0].cut.widths and (Axis.FFN, 32, 8) in cuts[2].cut.widths


def test_pitfall_23_resolving_leaves_nothing_behind() -> None:
    """Two micro-batches resolved in turn do not see each other, and a Gates object cannot be changed."""
    one = masks()
    first = one.layers(Gates.mask(soft(1)))
    before = {name: value for name, value in vars(one).items() if not name.startswith("_")}
    one.layers(Gates.slice(SPACE.subnet({Axis.HIDDEN: (2,)})))
    again = one.layers(Gates.mask(soft(1)))
    assert torch.equal(first[0].hidden.vector, again[0].hidden.vector)  # type: ignore[arg-type]
    assert {name: value for name, value in vars(one).items() if not name.startswith("_")} == before
    for frozen in (Gates.mask(soft(1)), first[0], first[0].cut, first[0].hidden):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.depth = None  # type: ignore[union-attr,misc,assignment]


def test_tables_are_built_once_and_stay_out_of_checkpoints() -> None:
    one = masks()
    assert len(dict(one.named_buffers())) == 2 * len(Axis) and one.state_dict() == {}
    assert not list(one.parameters())
    assert not dict(masks(space=Space(SHAPE, {})).named_buffers()), "nothing to choose, nothing to keep"


@pytest.mark.parametrize("axis", list(Axis))
def test_pitfall_17_gate_gradients_are_finite_at_probability_zero(axis: Axis) -> None:
    weights = one_hot({other: (0,) * SPACE.num_slots(other) for other in Axis})
    leaf = weights[axis].requires_grad_()
    layers = masks().layers(Gates.mask(weights))
    gates = [gate for layer in layers for gate in layer.widths.values()]
    total = sum((gate.vector.sum() for gate in gates if gate.vector is not None), start=torch.zeros(()))
    total = total + sum(layer.depth for layer in layers if layer.depth is not None)
    gradient = torch.autograd.grad(total, leaf)[0]
    assert torch.isfinite(gradient).all() and (gradient[:, 0] > 0).all()


@pytest.mark.parametrize("depth", [None, torch.tensor(0.25), torch.tensor(0.0)])
@pytest.mark.parametrize("hidden", [None, torch.tensor([1.0, 0.5, 0.0])])
def test_residual_adds_the_gated_output(depth: Tensor | None, hidden: Tensor | None) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    scale = (1.0 if depth is None else depth) * (1.0 if hidden is None else hidden)
    torch.testing.assert_close(TorchElementwise().residual(x, y, depth, hidden), x + scale * y)
    if depth is not None and depth == 0:
        assert torch.equal(TorchElementwise().residual(x, y, depth, hidden), x)


def test_full_is_ungated() -> None:
    layers = masks().layers(None)
    assert layers[0].hidden == Width(16)
    for layer in layers:
        assert layer.depth is None and all(gate.vector is None for gate in layer.widths.values())
    x = torch.randn(4)
    assert layers[0].hidden.apply(x) is x


FULL = Subnet.full(SHAPE)
REFUSED = [
    (Gates(Execution.SLICE), GatesError, "slice execution takes a subnet"),
    (Gates(Execution.SLICE, subnet=FULL, weights=soft()), GatesError, "slice execution takes a subnet"),
    (Gates(Execution.MASK, subnet=FULL, weights=soft()), GatesError, "mask execution takes weights"),
    (Gates.mask({Axis.HIDDEN: torch.ones(1, 2)}), GatesError, r"shape \(1, 2\), this space expects \(1, 3\)"),
    (Gates.mask({Axis.FFN: torch.ones(1, 3)}), GatesError, r"expects \(2, 3\)"),
    (Gates.slice(replace(FULL, ffn=(30, 32))), GatesError, "multiples of 4, the number of lanes"),
    (Gates.slice(replace(FULL, mamba_heads=(7, 8))), ShapeError, "mamba_heads = 7"),
    (Gates.slice(replace(FULL, attention_heads=(6,))), ShapeError, "attention_heads = 6"),
    (Gates.slice(replace(FULL, hidden=17)), SubnetError, "hidden = 17"),
    (Gates.slice(replace(FULL, kept_layers=(5,))), SubnetError, "kept_layers"),
]


@pytest.mark.parametrize(("gates", "error", "message"), REFUSED)
def test_pitfall_21_gates_that_do_not_fit_are_refused(gates: Gates, error: type[ValueError], message: str) -> None:
    with pytest.raises(error, match=message):
        masks().layers(gates)


def test_pitfall_21_weights_over_an_axis_without_choices_are_refused() -> None:
    space = Space(SHAPE, {Axis.HIDDEN: AxisChoices((16, 8))})
    with pytest.raises(GatesError, match="leave out an axis that is not elastic"):
        masks(space=space).layers(Gates.mask({Axis.FFN: torch.ones(1, 1)}))
