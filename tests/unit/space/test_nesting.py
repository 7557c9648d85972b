"""The nested layout: which rows of every parameter a width keeps, element by element, at any tensor-parallel size."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.model.sharding import shard_tensor
from elastic.space.axes import AXES, Axis
from elastic.space.layers import LAYER_PARAMETERS, MODEL_PARAMETERS, DimKind, parameter_dims, split_parameter_name
from elastic.space.nesting import (
    Block,
    Cut,
    Grid,
    add_kept,
    kept_indices,
    mask_table,
    parameter_grids,
    parameter_size,
    put_kept,
    take,
    take_each,
)
from elastic.space.shape import ModelShape


def cut(tensor_parallel: int = 1, **kept: int) -> Cut:
    """Cut a small parent: 24 hidden, 32 FFN in 4 lanes, 8 Mamba heads x 3 in 4 groups, 8 queries on 4 KV heads x 2."""
    parent = ModelShape.uniform(
        "M-*", vocab=20, hidden=24, ffn=32, mamba_heads=8, head_channels=3, mamba_groups=4, mamba_state=2,
        conv_kernel=4, attention_heads=8, kv_heads=4, attention_channels=2,
    )  # fmt: skip
    widths = {"hidden": 24, "ffn": 32, "mamba_heads": 8, "head_channels": 3, "attention_heads": 8} | kept
    full = {"hidden": 24, "ffn": 32, "mamba_heads": 8, "head_channels": 3, "attention_heads": 8}
    cuts = tuple((axis, full[entry.size], widths[entry.size]) for axis, entry in AXES.items())
    return Cut(parent, cuts, lanes=4, tensor_parallel=tensor_parallel)


def expected_rows(kind: DimKind, **kept: int) -> list[int]:
    """Write down docs/design.md 2 as conditions on each row of the small parent."""
    w = {"hidden": 24, "ffn": 32, "mamba_heads": 8, "head_channels": 3, "attention_heads": 8} | kept

    def inner(row: int) -> bool:  # [G=4, 2 heads, P=3]
        head, channel = divmod(row, 3)
        return head % 2 < w["mamba_heads"] // 4 and channel < w["head_channels"]

    def query_of(row: int, per_group: int) -> bool:  # rows of one KV head: `per_group` heads of 2 channels
        head = row // 2 % per_group
        return head >= 2 or head < w["attention_heads"] // 4  # heads 2 and 3 of QKV rows are key and value

    match kind:
        case DimKind.HIDDEN:
            return list(range(w["hidden"]))
        case DimKind.VOCAB:
            return list(range(20))
        case DimKind.FFN:  # lane l holds rows 8l..8l+7
            return [row for row in range(32) if row % 8 < w["ffn"] // 4]
        case DimKind.INNER:
            return [row for row in range(24) if inner(row)]
        case DimKind.MAMBA_HEAD:
            return [head for head in range(8) if head % 2 < w["mamba_heads"] // 4]
        case DimKind.IN_PROJ:  # z 0..23, x 24..47, B 48..55, C 56..63, dt 64..71
            z = [row for row in range(24) if inner(row)]
            dt = [64 + head for head in range(8) if head % 2 < w["mamba_heads"] // 4]
            return z + [24 + row for row in z] + list(range(48, 64)) + dt
        case DimKind.CONV:  # x 0..23, B 24..31, C 32..39
            return [row for row in range(24) if inner(row)] + list(range(24, 40))
        case DimKind.QKV:
            return [row for row in range(32) if query_of(row, 4)]
        case DimKind.TAPS:
            return list(range(4))
        case DimKind.ONE:
            return [0]
        case DimKind.CONTEXT:
            return [row for row in range(16) if query_of(row, 2)]
    raise AssertionError(kind)


CUTTABLE = [kind for kind in DimKind if kind not in (DimKind.TAPS, DimKind.ONE)]
WIDTHS = [
    {},
    {"hidden": 7},
    {"ffn": 4},
    {"mamba_heads": 4},
    {"head_channels": 2},
    {"attention_heads": 4},
    {"hidden": 11, "ffn": 12, "mamba_heads": 4, "head_channels": 1, "attention_heads": 4},
]


@pytest.mark.parametrize("kept", WIDTHS)
@pytest.mark.parametrize("kind", list(DimKind))
def test_kept_rows_are_those_of_the_design(kind: DimKind, kept: dict[str, int]) -> None:
    layout = cut(**kept).grid(kind)
    assert kept_indices(layout).tolist() == expected_rows(kind, **kept)
    assert layout.kept_size == len(expected_rows(kind, **kept))
    assert layout.full_size == len(expected_rows(kind))
    assert layout.is_whole == (layout.kept_size == layout.full_size)


@pytest.mark.parametrize("kept", WIDTHS)
@pytest.mark.parametrize("kind", CUTTABLE)
@pytest.mark.parametrize("size", [2, 4])
def test_pitfall_19_kept_rows_do_not_depend_on_tensor_parallelism(
    kind: DimKind, kept: dict[str, int], size: int
) -> None:
    """Each rank cuts its own shard; together they keep the rows one rank would, none twice."""
    name = next(
        (f"decoder.layers.{'M-*'.index(k)}.{n}" for n, k in _layer_names() if LAYER_PARAMETERS[n][0] is kind),
        "output_layer.weight" if kind is DimKind.VOCAB else None,
    )
    if name is None:  # INNER and CONTEXT: the norm weight and, for CONTEXT, the columns of linear_proj
        name = "decoder.layers.2.self_attention.linear_proj.weight"
    dims = parameter_dims(name)
    dim, shape = dims.index(kind), cut().shape
    full = parameter_size(name, shape)
    rows = torch.arange(full[dim]).view(*(-1 if d == dim else 1 for d in range(len(full)))).expand(full)
    seen = []
    for rank in range(size):
        shard = shard_tensor(rows, name, shape, rank, size)
        taken = take(shard, dim, cut(size, **kept).grid(kind))
        seen.append(taken.movedim(dim, 0).reshape(taken.shape[dim], -1)[:, 0].tolist())
    if kind is DimKind.HIDDEN:  # replicated: every rank keeps the same rows
        assert all(rows == expected_rows(kind, **kept) for rows in seen)
    else:
        assert sorted(itertools.chain(*seen)) == sorted(expected_rows(kind, **kept))
        assert len({len(rows) for rows in seen}) == 1, "equally many rows on every rank"


def _layer_names() -> list[tuple[str, str]]:
    kinds = {
        "norm": "M",
        "mixer": "M",
        "input_layernorm": "*",
        "self_attention": "*",
        "pre_mlp_layernorm": "-",
        "mlp": "-",
    }
    return [(name, kinds[name.split(".")[0]]) for name in LAYER_PARAMETERS]


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("conv_kernel", [2, 4])
def test_pitfall_06_layout_follows_any_groups_kernel_and_state(groups: int, conv_kernel: int) -> None:
    """No size of the published model is built in: B, C and the taps are whole, heads are cut per group."""
    parent = replace(cut().shape, mamba_groups=groups, conv_kernel=conv_kernel, mamba_heads=(16,), mamba_state=3)
    layout = Cut.of_layer(parent, 0, {Axis.MAMBA_HEAD: groups}).grid(DimKind.CONV)
    kept = kept_indices(layout).tolist()
    first_heads = [head for head in range(16) if head % (16 // groups) == 0]
    assert kept == [3 * head + p for head in first_heads for p in range(3)] + list(range(48, 48 + 6 * groups))
    assert parameter_size("decoder.layers.0.mixer.conv1d_weight", parent) == (48 + 6 * groups, 1, conv_kernel)


def test_smaller_widths_are_nested_in_larger_ones() -> None:
    """Every subnet is a set of prefixes: what a width keeps, every larger width keeps too."""
    axes = {"hidden": (24, 11, 3), "ffn": (32, 16, 4), "mamba_heads": (8, 4), "head_channels": (3, 2, 1)}
    axes |= {"attention_heads": (8, 4)}
    for axis, widths in axes.items():
        for kind in CUTTABLE:
            kept = [set(kept_indices(cut(**{axis: width}).grid(kind)).tolist()) for width in widths]
            assert all(later <= earlier for earlier, later in itertools.pairwise(kept))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_take_works_on_any_dimension_and_is_differentiable(dim: int) -> None:
    layout = Grid((Block((2, 3), (2, 1)), Block((4,), (3,))), outer=2)
    tensor = torch.randn(*(layout.full_size if d == dim else 2 for d in range(3)), requires_grad=True)
    kept = take(tensor, dim, layout)
    index = kept_indices(layout)
    assert torch.equal(kept, tensor.index_select(dim, index))
    kept.sum().backward()
    expected = torch.zeros_like(tensor).index_fill(dim, index, 1.0)
    assert torch.equal(tensor.grad, expected)


def test_take_copies_nothing_where_the_layout_allows() -> None:
    weight = torch.randn(24, 24)
    whole, prefix = cut().grid(DimKind.HIDDEN), cut(hidden=7).grid(DimKind.HIDDEN)
    assert take(weight, 0, whole) is weight
    one_lane = Grid((Block((1, 8, 3), (1, 5, 3)),))  # of a rank that owns one part alone
    for grid in (prefix, one_lane):
        kept = take(weight, 1, grid)
        assert grid.is_prefix and kept.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert torch.equal(kept, weight[:, kept_indices(grid)])
    for grid in (
        Grid((Block((2, 4, 3), (2, 2, 3)),)),
        Grid((Block((1, 8, 3), (1, 5, 2)),)),
        Grid((Block((12,), (5,)),), 2),
    ):
        assert not grid.is_prefix


class Operations(TorchDispatchMode):
    """Notes operations that are no views and do more than allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ != "new_empty":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_take_is_one_copy_and_its_gradient_one_fill_and_one_write() -> None:
    for kind in (DimKind.IN_PROJ, DimKind.FFN):
        layout = cut(mamba_heads=4, ffn=12).grid(kind)
        first, second = (torch.randn(layout.full_size, 5, requires_grad=True) for _ in range(2))
        take(first, 0, layout)  # the row numbers are made once
        with Operations() as forward:
            kept = take_each((first, second), 0, layout)
        copy, write = ("index_select", "index_copy_") if kind is DimKind.IN_PROJ else ("copy_", "copy_")
        assert forward.names == [copy, copy]
        ones = [torch.ones_like(part) for part in kept]
        with Operations() as backward:
            gradients = torch.autograd.grad(kept, (first, second), ones)
        assert backward.names == ["new_zeros", write, write]
        expected = torch.zeros_like(first).index_fill(0, kept_indices(layout), 1.0)
        assert all(torch.equal(gradient, expected) for gradient in gradients)


@pytest.mark.parametrize("kept", WIDTHS)
@pytest.mark.parametrize("kind", list(DimKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taking_putting_and_adding_are_what_indexing_is(
    kind: DimKind, kept: dict[str, int], dtype: torch.dtype
) -> None:
    """Bit for bit, along each dimension, also of a strided view."""
    layout = cut(**kept).grid(kind)
    index = kept_indices(layout)
    for dim in (0, 1):
        size = (layout.full_size, 3) if dim == 0 else (3, layout.full_size)
        wide = torch.randn(*size[:1], size[1] + 2, dtype=dtype, requires_grad=True)
        tensor = wide[:, : size[1]]
        taken, expected = take(tensor, dim, layout), tensor.index_select(dim, index)
        assert torch.equal(taken, expected)
        back = torch.randn_like(expected)
        found, wanted = (torch.autograd.grad(kept, wide, back, retain_graph=True)[0] for kept in (taken, expected))
        assert torch.equal(found, wanted)
        total = torch.randn(size[0], size[1] + 2)[:, : size[1]]
        summed, written = total.index_add(dim, index, back.float()), total.index_copy(dim, index, back.float())
        add_kept(total, dim, layout, back)
        assert torch.equal(total, summed)
        put_kept(total, dim, layout, back.float())
        assert torch.equal(total, written)


def test_take_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="dimension 1 has 23 rows, the nested layout expects 24"):
        take(torch.zeros(2, 23), 1, cut().grid(DimKind.HIDDEN))


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_masks_and_slices_keep_the_same(repeats: int) -> None:
    choices = (32, 16, 4)
    table = mask_table(choices, repeats, 32)
    assert table.shape == (3, 32) and table.dtype is torch.float32
    for row, choice in zip(table, choices, strict=True):
        layout = Grid((Block((32 // repeats,), (choice // repeats,)),), outer=repeats)
        assert row.nonzero().flatten().tolist() == kept_indices(layout).tolist() and row.sum() == choice


def test_names_lead_to_layers_and_meanings() -> None:
    assert split_parameter_name("decoder.layers.12.mixer.D") == (12, "mixer.D")
    assert split_parameter_name("output_layer.weight") == (None, "output_layer.weight")
    assert parameter_dims("decoder.layers.3.mlp.linear_fc2.weight") == (DimKind.HIDDEN, DimKind.FFN)
    for unknown in ("decoder.layers.3.mlp.linear_fc3.weight", "router.weight"):
        with pytest.raises(KeyError):
            parameter_dims(unknown)


def test_every_parameter_has_a_layout_for_each_dimension() -> None:
    names = [f"decoder.layers.{'M-*'.index(kind)}.{name}" for name, kind in _layer_names()] + list(MODEL_PARAMETERS)
    for name in names:
        layouts = parameter_grids(name, cut().shape)
        assert len(layouts) == len(parameter_dims(name))
        assert all(layout.is_whole for layout in layouts)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_what_is_taken_is_the_same_with_and_without_gradients(tensor_parallel: int) -> None:
    shape = ModelShape.uniform(
        "M*", vocab=8, hidden=8, ffn=16, mamba_heads=8, head_channels=6, mamba_groups=2, mamba_state=4, conv_kernel=4,
        attention_heads=8, kv_heads=2, attention_channels=4,
    )  # fmt: skip
    mamba, attention = {Axis.MAMBA_HEAD: 4, Axis.MAMBA_CHANNEL: 3}, {Axis.ATTENTION_HEAD: 4}
    for layer_index, kept, kinds in ((0, mamba, (DimKind.IN_PROJ, DimKind.CONV)), (1, attention, (DimKind.QKV,))):
        cut = Cut.of_layer(shape, layer_index, kept, tensor_parallel=tensor_parallel)
        for kind in kinds:
            layout = cut.grid(kind)
            matrix = torch.arange(layout.full_size * 3.0).view(3, layout.full_size)
            for dim, tensor in ((1, matrix), (0, matrix.t().contiguous())):
                with torch.no_grad():
                    plain = take(tensor, dim, layout)
                assert torch.equal(plain, take(tensor, dim, layout)) and plain.shape[dim] == layout.kept_size
