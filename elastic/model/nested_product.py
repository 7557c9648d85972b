"""Products of a few tokens with the nested part of a weight where it lies, without a copy of what is kept.

For one token a product reads every weight once, so gathering the kept rows first would cost more than the product
itself. The kept part is a few strided grids instead, and each is one batched product on a view.

Shapes: T tokens, R rows and C columns of this rank's weight, r and c of them kept, b matrices of m rows in a batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.space.nesting import Grid


@dataclass(frozen=True)
class _Strip:
    """One block's kept rows as a view [b, m, C], m in runs of `full` rows of which the first `kept` count.

    A batch has one stride, so of two directions that are both cut (heads of a group, channels of a head) the inner one
    is computed whole: one product that does a little more is faster than many small ones.
    """

    view: Tensor
    full: int = 1
    kept: int = 1


def product_with_rows(x: Tensor, weight: Tensor, rows: Grid) -> Tensor:
    """Map x [T, C] to [T, r] with the kept rows of `weight` [R, C]."""
    if rows.is_whole:
        return x @ weight.t()
    parts = []
    for strip in _strips(weight, rows):
        y = torch.bmm(x.expand(len(strip.view), -1, -1), strip.view.mT)  # [b, T, m]
        runs = y.transpose(0, 1).unflatten(2, (-1, strip.full))[..., : strip.kept]
        parts.append(runs.reshape(x.shape[0], rows.outer, -1))
    return torch.cat(parts, dim=2).flatten(1)


def product_with_columns(x: Tensor, weight: Tensor, columns: Grid) -> Tensor:
    """Map x [T, c] to [T, R] with the kept columns of `weight` [R, C]."""
    if columns.is_whole:
        return x @ weight.t()
    sizes = [math.prod(block.kept) for block in columns.blocks]
    by_block = x.unflatten(1, (columns.outer, -1)).split(sizes, dim=2)
    total = x.new_zeros(x.shape[0], weight.shape[0])
    for strip, own in zip(_strips(weight.t(), columns), by_block, strict=True):
        runs = own.reshape(x.shape[0], len(strip.view), -1, strip.kept)
        rows = F.pad(runs, (0, strip.full - strip.kept)).flatten(2).transpose(0, 1)  # [b, T, m]
        total += torch.bmm(rows, strip.view).sum(dim=0)
    return total


def _strips(weight: Tensor, layout: Grid) -> Iterator[_Strip]:
    """Yield the kept part of dimension 0 of `weight`, block by block."""
    sizes = [math.prod(block.full) for block in layout.blocks]
    for block, part in zip(layout.blocks, weight.unflatten(0, (layout.outer, -1)).split(sizes, dim=1), strict=True):
        # Directions as (full, kept); one that is whole lies side by side with the one around it.
        directions: list[tuple[int, int]] = []
        for full, kept in zip(block.full, block.kept, strict=True):
            if directions and full == kept:
                around = directions.pop()
                full, kept = around[0] * full, around[1] * kept
            directions.append((full, kept))
        if layout.outer > 1 or len(directions) == 1 or directions[0][0] != directions[0][1]:
            directions.insert(0, (layout.outer, layout.outer))
        assert len(directions) <= 3, "nobody lays out a grid that is cut in three directions"
        (batch, _), (full, kept), *inner = directions
        run = inner[0] if inner else (1, 1)
        yield _Strip(part.view(batch, full * run[0], -1)[:, : kept * run[0]], *run)
