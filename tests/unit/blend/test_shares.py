"""Which source a sample comes from: within one sample of the weights at every place, and known at any place at once."""

import random
from pathlib import Path

import pytest

from elastic.blend.shares import BLOCK, Carried, Mix, Shares
from elastic.blend.sources import TrainingData
from elastic.checkpoint.state import TrainingState
from elastic.config.load import config_dict, load
from elastic.config.verbs import PretrainConfig
from elastic.run.changes import ResumeError
from elastic.run.resume import BLEND, carried_blend

ODD = [0.37, 0.0213, 1.1, 0.2, 3 / 7, 17.0, 0.9]


def dealt(weights: list[float], num_samples: int) -> list[tuple[int, int]]:
    shares = Shares(weights)
    return [shares.at(sample) for sample in range(num_samples)]


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [0.5, 0.3, 0.2],
        ODD,
        [0.9, *[0.1 / 12] * 12],
        [1.0] * 7,
        [13482995123.0, 998877665.0, 42424242.0],
        [1, 99],
    ],
    ids=lambda weights: f"{len(weights)} of {weights[0]:g}",
)
def test_every_source_is_within_one_sample_of_its_share_at_every_place(weights: list[float]) -> None:
    shares, counts = Shares(weights), [0] * len(weights)
    for sample, (source, index) in enumerate(dealt(weights, 2 * BLOCK + 100)):
        if sample % 97 == 0 or sample == BLOCK:
            assert Shares(weights).counts(sample) == counts
        assert index == counts[source], "a source's samples come one after the other"
        counts[source] += 1
        for count, part in zip(counts, shares.parts, strict=True):
            assert abs(count * shares.whole - (sample + 1) * part) < shares.whole


def test_any_place_is_found_without_those_before_it() -> None:
    generator = random.Random(0)
    for trial in range(40):
        weights = [generator.choice([generator.random() + 0.01, 5.0, 0.5]) for _ in range(generator.randint(2, 9))]
        all_of_them = dealt(weights, 3000)
        for sample in (generator.randrange(3000), 2 * BLOCK - 1, 2 * BLOCK):
            assert Shares(weights).at(sample) == all_of_them[sample], f"{trial}: {weights} at {sample}"


@pytest.mark.parametrize("weights", [ODD, [0.7, 0.21, 0.0900013], [1.0, 2e-6, 0.5]], ids=["odd", "digits", "rare"])
def test_at_sample_a_thousand_million(weights: list[float]) -> None:
    first = 10**9 - 500
    shares, counts = Shares(weights), Shares(weights).counts(first)
    assert sum(counts) == first
    for sample in range(first, first + 1000):
        source, index = shares.at(sample)
        assert index == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (sample + 1) * weight / sum(weights)) < 1.001
    assert Shares(weights).counts(first + 1000) == counts


def test_the_turns_never_change() -> None:
    """Pinned: a resumed run on a later version must read the same samples."""
    assert "".join("abc"[source] for source, _ in dealt([0.5, 0.3, 0.2], 20)) == "abacababacabacababac"


def test_weights_are_read_as_they_are_written_and_only_their_shares_count() -> None:
    assert Shares([0.1, 0.2, 0.7]).parts == (1, 2, 7)
    assert Shares([1e3, 2e3, 7e3]).parts == (1, 2, 7)


def test_the_order_of_a_list_says_nothing() -> None:
    one, other = Mix([dict(a=0.3, b=0.7)]), Mix([dict(b=7.0, a=3.0)])
    assert one.parts(0) == other.parts(0) and one.consumed(0, 1000) == other.consumed(0, 1000) == dict(a=300, b=700)


def test_after_a_change_the_new_shares_hold_and_sources_go_on_where_they_were() -> None:
    before = Mix([dict(a=1.0, b=1.0, gone=2.0)] * 2)
    carried = Carried(1, 100, before.consumed(1, 100), before=[dict(a=25, b=25, gone=9)])
    after = Mix([dict(a=9.0, b=1.0), dict(a=1.0, b=3.0, new=4.0)], carried)
    assert before.consumed(1, 100) == dict(a=25, b=25, gone=50)
    assert after.consumed(1, 180) == dict(a=35, b=55, gone=50, new=40)
    lengths = [dict(a=50, b=100, new=20)] * 2
    assert after.epochs(lengths, [400, 400], 1, 180) == dict(a=0.5 + 35 / 50, b=0.25 + 0.55, new=2.0)


def test_a_phase_reads_every_source_from_its_start_and_may_leave_one_out() -> None:
    mix = Mix([dict(a=1.0, b=1.0), dict(a=1.0, b=0.0)])
    assert mix.consumed(1, 10) == dict(a=10)
    assert mix.epochs([dict(a=10, b=10)] * 2, [20, 20], 1, 10) == dict(a=2.0, b=1.0)


def test_where_a_blend_stood_as_another_version_wrote_it_is_named(folder: Path) -> None:
    phase = dict(name="one", sequence_length=16, global_batch=8, steps=100)
    config = load(PretrainConfig, dict(data=dict(path=str(folder / "code")), curriculum=[phase]))
    state = TrainingState(98, config.seed, config_dict(config), {BLEND: {"phase": 0, "epochs": {}}})
    data = TrainingData(config.data, config.curriculum, config.seed)
    with pytest.raises(ResumeError, match=r"its blend is of another version .*epochs.* new run"):
        carried_blend(state, config, data)
