"""Schedules and the curriculum: values at the edges, and where a step falls."""

import pytest

from elastic.router.phases import Curriculum, Phase
from elastic.router.schedules import LearningRate, Linear


def test_linear_runs_from_start_to_end():
    schedule = Linear(1.0, 0.05)
    assert schedule.at(0.0) == 1.0
    assert schedule.at(1.0) == pytest.approx(0.05)
    assert schedule.at(0.5) == pytest.approx(0.525)


def test_warm_up_is_linear_and_never_zero():
    rate = LearningRate(1.0, warmup_steps=4)
    assert [rate.at(step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate.at(9, 10) == 1.0


def test_cosine_ends_at_the_minimum_with_the_last_step():
    rate = LearningRate(1.0, minimum=0.1, warmup_steps=2, cosine=True)
    values = [rate.at(step, 12) for step in range(12)]
    assert values[1] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert values[2:] == sorted(values[2:], reverse=True)


def test_places_walk_through_the_phases():
    short = Phase("short", 256, 8, 3, LearningRate(1.0), temperature=Linear(1.0, 0.0))
    long = Phase("long", 1024, 4, 2, LearningRate(0.5))
    curriculum = Curriculum((short, long))
    places = [curriculum.at(step) for step in range(curriculum.total_steps)]
    assert [(place.phase_index, place.step_in_phase) for place in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [place.consumed_samples for place in places] == [0, 8, 16, 0, 4]
    assert [place.temperature for place in places[:3]] == [1.0, 0.5, 0.0]
    assert places[3].learning_rate == 0.5
    assert short.tokens_per_step == 2048
    with pytest.raises(ValueError, match="beyond the curriculum's 5 steps"):
        curriculum.at(5)
