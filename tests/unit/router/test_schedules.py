"""Schedules and the curriculum: values at the edges, and where a step falls."""

import pytest

from elastic.router.phases import Curriculum, ElasticPhase, LearningRate, Phase


def test_temperature_and_scale_run_linearly_from_start_to_end():
    curriculum = Curriculum((ElasticPhase(name="a", steps=3, temperature=(1.0, 0.05), logit_scale=(1.0, 10.0)),))
    assert [curriculum.at(step).temperature for step in range(3)] == pytest.approx([1.0, 0.525, 0.05])
    assert [curriculum.at(step).logit_scale for step in range(3)] == pytest.approx([1.0, 5.5, 10.0])


def test_warm_up_is_linear_and_never_zero():
    rate = LearningRate(1.0, warmup_steps=4)
    assert [rate.at(step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate.at(9, 10) == 1.0


def test_cosine_ends_at_the_minimum_with_the_last_step():
    rate = LearningRate(1.0, min=0.1, warmup_steps=2, schedule="cosine")
    values = [rate.at(step, 12) for step in range(12)]
    assert values[1] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert values[2:] == sorted(values[2:], reverse=True)


def test_places_walk_through_the_phases():
    short = ElasticPhase(name="short", global_batch=8, steps=3, temperature=(1.0, 0.0))
    long = Phase(name="long", sequence_length=1024, global_batch=4, steps=2, lr=LearningRate(0.5))
    curriculum = Curriculum((short, long))
    moments = [curriculum.at(step) for step in range(curriculum.total_steps)]
    assert [(at.phase_index, at.step_in_phase) for at in moments] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [at.consumed_samples for at in moments] == [0, 8, 16, 0, 4]
    assert [at.temperature for at in moments[:3]] == [1.0, 0.5, 0.0]
    assert moments[3].learning_rate == 0.5
    assert short.tokens_per_step == 2048
    with pytest.raises(ValueError, match="beyond the curriculum's 5 steps"):
        curriculum.at(5)
