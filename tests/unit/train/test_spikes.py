"""Loss spikes: a value far above its recent median is reported once, ordinary noise and falling losses are not."""

import random

from elastic.train.log import MIN_HISTORY, WINDOW, LossSpikes


def noisy(count: int, level: float = 2.0, noise: float = 0.05) -> list[float]:
    generator = random.Random(3)
    return [generator.gauss(level, noise) for _ in range(count)]


def test_a_jump_is_reported_with_its_distance_in_robust_deviations() -> None:
    spikes = LossSpikes(8.0)
    assert [spikes.take("half", value, 0) for value in noisy(30)] == [None] * 30
    spike = spikes.take("half", 4.0, 0)
    assert spike is not None and spike.name == "half" and spike.loss == 4.0
    past = sorted(noisy(30))
    usual = (past[14] + past[15]) / 2
    distances = sorted(abs(value - usual) for value in past)
    assert spike.usual == usual
    assert abs(spike.deviations - (4.0 - usual) / (1.4826 * (distances[14] + distances[15]) / 2)) < 1e-9
    assert str(spike).startswith("loss spike: half 4, ")
    assert spikes.take("half", 2.0, 0) is None, "one outlier does not move a median"


def test_noise_falling_losses_and_short_histories_say_nothing() -> None:
    spikes = LossSpikes(8.0)
    assert not any(spikes.take("noise", value, 0) for value in noisy(2000))
    assert not any(spikes.take("falling", 8.0 * 0.9**step, 0) for step in range(200))
    assert not any(spikes.take("constant", 1.0 + 1e-6 * (step % 2), 0) for step in range(200))
    assert not any(spikes.take("short", value, 0) for value in [*noisy(MIN_HISTORY - 1), 50.0])


def test_each_budget_and_each_phase_has_its_own_history() -> None:
    spikes = LossSpikes(8.0)
    for value in noisy(20):
        assert spikes.take("full", value, 0) is None
        assert spikes.take("small", 2 * value, 0) is None
    assert spikes.take("small", 4.0, 0) is None and spikes.take("full", 4.0, 0) is not None
    assert spikes.take("full", 40.0, 1) is None, "a new phase starts anew"


def test_a_lasting_rise_is_reported_until_it_is_usual() -> None:
    spikes = LossSpikes(8.0)
    for value in noisy(WINDOW):
        spikes.take("full", value, 0)
    reported = [spikes.take("full", value, 0) is not None for value in noisy(WINDOW, level=4.0)]
    assert reported[0] and not reported[-1]
