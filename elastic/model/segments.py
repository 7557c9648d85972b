"""Where the pipeline is cut: as the pattern says, else into stages of about equal work."""

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
    text, start, pieces = str(pattern), 0, []
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    return "|".join(pieces)


def balanced_segments(shape: ModelShape, stages: int) -> list[int]:
    """Return the number of layers of each stage, minimising the heaviest stage (dynamic programming)."""
    work = [
        layer_flops_per_token(shape, kind, shape.layer_widths(index), length_tokens=8192)
        for index, kind in enumerate(shape.pattern.kinds)
    ]
    layers = len(work)
    if not 1 <= stages <= layers:
        raise PipelineError(f"parallel.pipeline = {stages}: must be between 1 and the number of layers, {layers}")
    head = 2 * shape.vocab * shape.hidden
    total = [0]
    for amount in work:
        total.append(total[-1] + int(amount))
    # best[s][n]: smallest possible maximum over the first s stages holding the first n layers.
    best: list[list[float]] = [[float("inf")] * (layers + 1) for _ in range(stages + 1)]
    cut = [[0] * (layers + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        extra = head if stage == stages else 0
        for end in range(stage, layers + 1):
            for start in range(stage - 1, end):
                heaviest = max(best[stage - 1][start], total[end] - total[start] + extra)
                if heaviest < best[stage][end]:
                    best[stage][end], cut[stage][end] = heaviest, start
    sizes, end = [], layers
    for stage in range(stages, 0, -1):
        start = cut[stage][end]
        sizes.append(end - start)
        end = start
    return sizes[::-1]
