"""Products on views equal the product with the kept rows or columns copied out, for every layout, exactly in fp64."""

import pytest
import torch

from elastic.model.nested_product import product_with_columns, product_with_rows
from elastic.space.nesting import Block, Cut, DimKind, DimLayout, take
from elastic.space.shape import ModelShape

SHAPE = ModelShape.uniform(
    "M*-", vocab=8, hidden=7, ffn=24, mamba_heads=8, head_channels=5, mamba_groups=2, mamba_state=3, conv_kernel=4,
    attention_heads=12, kv_heads=4, attention_channels=3,
)  # fmt: skip
KINDS = {0: (DimKind.IN_PROJ, DimKind.INNER), 1: (DimKind.QKV, DimKind.CONTEXT), 2: (DimKind.FFN,)}
# Of each layer kind: kept widths, whole and cut; Mamba channels whole and cut.
CUTS = [(0, 8, 5), (0, 6, 5), (0, 8, 3), (0, 6, 3), (0, 2, 1), (1, 12, 5), (1, 8, 5), (1, 4, 5), (2, 24, 5), (2, 16, 5)]
# Grids that no parameter has today.
ODD = [
    DimLayout((Block((5, 4), (3, 4)), Block((4,), (2,)))),
    DimLayout((Block((5, 4), (3, 2)), Block((4,), (1,))), outer=3),
    DimLayout((Block((3, 4), (2, 4)),), outer=2),
]


def layouts() -> list[DimLayout]:
    found = list(ODD)
    for layer_index, kept, channels in CUTS:
        for tensor_parallel in (1, 2):
            cut = Cut.of_layer(
                SHAPE, layer_index, kept, hidden=7, head_channels=channels, lanes=8, tensor_parallel=tensor_parallel
            )
            found += [cut.layout(kind) for kind in KINDS[layer_index]]
    return found


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_product_equals_that_with_a_copy(layout: DimLayout, tokens: int) -> None:
    rows, other = torch.randn(layout.full_size, 6).double(), 6
    # The weight is itself a view of a wider one, as when hidden channels are cut too.
    weight, x = torch.cat([rows, torch.randn_like(rows)], dim=1)[:, :other], torch.randn(tokens, other).double()
    torch.testing.assert_close(product_with_rows(x, weight, layout), x @ take(weight, 0, layout).t())
    weight, x = torch.randn(other, layout.full_size).double(), torch.randn(tokens, layout.kept_size).double()
    torch.testing.assert_close(product_with_columns(x, weight, layout), x @ take(weight, 1, layout).t())
