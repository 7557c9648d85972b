"""Where the pipeline is cut: as the pattern says, else into stages of about equal work."""

from itertools import accumulate, islice
from operator import itemgetter

from elastic.space.cost import layer_flops_per_token
from elastic.space.shape import ModelShape


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
        layer_flops_per_token(shape, kind, shape.layer_widths(index), length_tokens=8192)
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
