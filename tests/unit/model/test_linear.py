"""Products on views equal the product with the kept rows or columns copied out, for every layout, exactly in fp64."""

import pytest
import torch

from elastic.model.linear import product_with_columns, product_with_rows
from elastic.space.axes import Axis
from elastic.space.layers import DimKind
from elastic.space.nesting import Block, Cut, Grid, take
from elastic.space.shape import ModelShape

SHAPE = ModelShape.uniform(
    "M*-", vocab=8, hidden=7, ffn=24, mamba_heads=8, head_channels=5, mamba_groups=2, mamba_state=3, conv_kernel=4,
    attention_heads=12, kv_heads=4, attention_channels=3,
)  # fmt: skip
KINDS = {0: (DimKind.IN_PROJ, DimKind.INNER), 1: (DimKind.QKV, DimKind.CONTEXT), 2: (DimKind.FFN,)}
# Of each layer kind: kept widths, whole and cut; Mamba channels whole and cut.
CUTS = [(0, {Axis.MAMBA_HEAD: h, Axis.MAMBA_CHANNEL: p}) for h, p in ((8, 5), (6, 5), (8, 3), (6, 3), (2, 1))]
CUTS += [(1, {Axis.ATTENTION_HEAD: q}) for q in (12, 8, 4)] + [(2, {Axis.FFN: f}) for f in (24, 16)]
# Grids that no parameter has today.
ODD = [
    Grid((Block((5, 4), (3, 4)), Block((4,), (2,)))),
    Grid((Block((5, 4), (3, 2)), Block((4,), (1,))), outer=3),
    Grid((Block((3, 4), (2, 4)),), outer=2),
]


def layouts() -> list[Grid]:
    found = list(ODD)
    for layer_index, kept in CUTS:
        for tensor_parallel in (1, 2):
            cut = Cut.of_layer(SHAPE, layer_index, kept, lanes=8, tensor_parallel=tensor_parallel)
            found += [cut.grid(kind) for kind in KINDS[layer_index]]
    return found


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_product_equals_that_with_a_copy(layout: Grid, tokens: int) -> None:
    rows, other = torch.randn(layout.full_size, 6).double(), 6
    # The weight is itself a view of a wider one, as when hidden channels are cut too.
    weight, x = torch.cat([rows, torch.randn_like(rows)], dim=1)[:, :other], torch.randn(tokens, other).double()
    torch.testing.assert_close(product_with_rows(x, weight, layout), x @ take(weight, 0, layout).t())
    weight, x = torch.randn(other, layout.full_size).double(), torch.randn(tokens, layout.kept_size).double()
    torch.testing.assert_close(product_with_columns(x, weight, layout), x @ take(weight, 1, layout).t())
