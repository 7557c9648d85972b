"""How a model is split: parameters over tensor-parallel ranks, from the one table of the nested layout, and layers over
pipeline stages, as the pattern says or else into about equal work."""

from collections.abc import Sequence
from itertools import accumulate, islice
from operator import itemgetter

import torch
from torch import Tensor

from elastic.space.cost import layer_cost
from elastic.space.layers import parameter_dims
from elastic.space.nesting import Grid, parameter_grids
from elastic.space.shape import ModelShape


def sharded_dim(name: str) -> int | None:
    """Return the dimension that tensor parallelism shards, or None for a replicated parameter."""
    return next((dim for dim, kind in enumerate(parameter_dims(name)) if kind.is_sharded), None)


def block_sizes(name: str, shape: ModelShape, dim: int) -> list[int]:
    """Return the runs of rows that are split one by one ([z, x, B, C, dt]); a repeated layout is one run."""
    layout = parameter_grids(name, shape)[dim]
    assert layout is not None
    if layout.outer > 1 or len(layout.blocks) == 1:
        return [layout.full_size]
    return [Grid((block,)).full_size for block in layout.blocks]


def shard_tensor(full: Tensor, name: str, shape: ModelShape, rank: int, size: int) -> Tensor:
    """Return tensor-parallel rank `rank`'s part of a full parameter."""
    dim = sharded_dim(name)
    if dim is None or size == 1:
        return full
    parts = full.split(block_sizes(name, shape, dim), dim=dim)
    return torch.cat([part.chunk(size, dim=dim)[rank] for part in parts], dim=dim)


def unshard_tensors(shards: Sequence[Tensor], name: str, shape: ModelShape) -> Tensor:
    """Join the parts of all tensor-parallel ranks, in rank order, into the full parameter."""
    dim = sharded_dim(name)
    if dim is None or len(shards) == 1:
        return shards[0]
    sizes = [rows // len(shards) for rows in block_sizes(name, shape, dim)]
    split = [shard.split(sizes, dim=dim) for shard in shards]
    return torch.cat([parts[block] for block in range(len(sizes)) for parts in split], dim=dim)


class PipelineError(ValueError):
    """A pattern that cannot be cut into the requested number of stages."""


def pipeline_pattern(shape: ModelShape, stages: int) -> str:
    """Return the layer pattern with `|` between stages, Megatron-Core's notation.

    Segments written in the pattern are kept and must number `stages` (one stage needs none); otherwise layers are
    dealt out so that no stage's forward FLOPs exceed the smallest possible maximum, the head counted on the last stage.
    """
    pattern = shape.pattern
    if len(pattern.segments) > 1 and stages > 1:
        if len(pattern.segments) != stages:
            raise PipelineError(
                f"parallel.pipeline = {stages}: the layer pattern is cut by hand into {len(pattern.segments)} stages; "
                f"use parallel.pipeline={len(pattern.segments)} or write the pattern without |"
            )
        sizes = list(pattern.segments)
    else:
        sizes = balanced_segments(shape, stages)
    layers = iter(str(pattern))
    return "|".join("".join(islice(layers, size)) for size in sizes)


def balanced_segments(shape: ModelShape, stages: int) -> list[int]:
    """Return the number of layers of each stage, minimising the heaviest stage (dynamic programming)."""
    work = [
        layer_cost(shape, kind, shape.layer_widths(index), length_tokens=8192)[1]
        for index, kind in enumerate(shape.pattern.kinds)
    ]
    if not 1 <= stages <= len(work):
        raise PipelineError(f"parallel.pipeline = {stages}: must be between 1 and the number of layers, {len(work)}")
    total = [0, *accumulate(map(int, work))]
    # By number of first layers: the smallest possible heaviest stage over them, and the layers of each stage.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for stage in range(1, stages + 1):
        head = 2 * shape.vocab * shape.hidden if stage == stages else 0
        best = {
            end: min(
                (
                    (max(heaviest, total[end] - total[start] + head), [*sizes, end - start])
                    for start, (heaviest, sizes) in best.items()
                    if start < end
                ),
                key=itemgetter(0),
            )
            for end in range(stage, len(work) + 1)
        }
    return best[len(work)][1]
