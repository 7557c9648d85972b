"""Pipeline stages: as the pattern is cut by hand, else balanced by forward FLOPs."""

import itertools
from dataclasses import replace

import pytest

from elastic.model.sharding import PipelineError, balanced_segments, pipeline_pattern
from elastic.space.cost import layer_cost
from elastic.space.shape import LayerPattern, ModelShape


def shape(pattern: str, vocab: int = 64) -> ModelShape:
    return ModelShape.uniform(
        pattern, vocab=vocab, hidden=64, ffn=256, mamba_heads=8, head_channels=16, mamba_groups=2, mamba_state=16,
        conv_kernel=4, attention_heads=4, kv_heads=2, attention_channels=16,
    )  # fmt: skip


def heaviest(model: ModelShape, sizes: tuple[int, ...]) -> int:
    """Return the forward FLOPs of the heaviest stage, the head on the last one."""
    starts = (0, *itertools.accumulate(sizes))
    work = [
        layer_cost(model, kind, model.layer_widths(index), 8192)[1] for index, kind in enumerate(model.pattern.kinds)
    ]
    stages = [sum(work[start:end]) for start, end in itertools.pairwise(starts)]
    stages[-1] += 2 * model.vocab * model.hidden
    return max(stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vocab", [64, 20_000])
def test_no_other_cut_has_a_lighter_heaviest_stage(stages: int, vocab: int) -> None:
    model = shape("M-M*-M-*", vocab)
    sizes = tuple(balanced_segments(model, stages))
    assert len(sizes) == stages and sum(sizes) == 8 and min(sizes) >= 1
    cuts = itertools.combinations(range(1, 8), stages - 1)
    every = [tuple(b - a for a, b in itertools.pairwise((0, *cut, 8))) for cut in cuts]
    assert heaviest(model, sizes) == min(heaviest(model, other) for other in every)


def test_a_heavy_head_leaves_fewer_layers_to_the_last_stage() -> None:
    light, heavy = (balanced_segments(shape("M-M-M-M-", vocab), 2) for vocab in (64, 20_000))
    assert heavy[-1] < light[-1]


def test_pattern_is_written_with_boundaries() -> None:
    model = shape("M-M*-M-*")
    text = pipeline_pattern(model, 3)
    assert text.replace("|", "") == "M-M*-M-*" and text.count("|") == 2
    assert list(LayerPattern.parse(text).segments) == balanced_segments(model, 3)
    assert pipeline_pattern(model, 1) == "M-M*-M-*"


def test_boundaries_written_by_hand_are_kept() -> None:
    by_hand = shape("M|-M*-|M-*")
    assert pipeline_pattern(by_hand, 3) == "M|-M*-|M-*"
    assert pipeline_pattern(by_hand, 1) == "M-M*-M-*", "one process can open what three stages trained"
    with pytest.raises(PipelineError, match=r"cut by hand into 3 stages; use parallel\.pipeline=3"):
        pipeline_pattern(by_hand, 2)


@pytest.mark.parametrize("stages", [0, 9])
def test_impossible_numbers_of_stages_are_refused(stages: int) -> None:
    with pytest.raises(PipelineError, match="between 1 and the number of layers, 8"):
        pipeline_pattern(shape("M-M*-M-*"), stages)


def test_layers_of_a_submodel_weigh_by_their_own_width() -> None:
    even = shape("----")
    uneven = replace(even, ffn=(1024, 16, 16, 16))
    assert balanced_segments(even, 2) == [2, 2] and balanced_segments(uneven, 2) == [1, 3]
