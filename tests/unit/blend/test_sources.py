"""Several sources read as one: prepared folders, what another tool wrote, and what cannot be read together."""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.blend.foreign import ForeignStream, foreign_prefixes, tokenizer_record
from elastic.blend.shares import Carried
from elastic.blend.sources import TrainingData, open_held_out, open_sources
from elastic.checkpoint.state import TrainingState
from elastic.config.load import ConfigError, config_dict, load
from elastic.config.rules_layout import Cluster
from elastic.config.sections import PreparedData, TrainExpManagerConfig
from elastic.config.verbs import ImportanceConfig, PretrainConfig
from elastic.data import manifest
from elastic.data.held_out import validation_batches
from elastic.data.manifest import DataError
from elastic.data.stream import read_batch
from elastic.data.tokens import TokenStream
from elastic.router.phases import Phase
from elastic.run.resume import carried_blend
from elastic.verbs.inputs import load_run
from elastic.verbs.text import length_problems
from tests.unit.blend.conftest import poked

S = 16
WEIGHTS = dict(code=0.31, text=0.2, foreign=0.6)


def blend(folder: Path, **more: Any) -> dict[str, Any]:
    entries = [dict(path=str(folder / name), weight=weight) for name, weight in WEIGHTS.items()]
    entries[2] |= dict(tokenizer=str(folder / "code"), validation=str(folder / "held"))
    return {"blend": entries, **more}


def training_data(folder: Path, weights: Mapping[str, float] = WEIGHTS, **phase: Any) -> TrainingData:
    values = blend(folder)
    values["blend"] = [entry | dict(weight=weights[name]) for name, entry in zip(WEIGHTS, values["blend"], strict=True)
                       if name in weights]  # fmt: skip
    phases = [Phase(name=name, sequence_length=S, global_batch=8, steps=100, **phase) for name in ("one", "two")]
    return TrainingData(load(PreparedData, values), phases, seed=5)


def test_samples_come_in_turn_and_every_document_once_an_epoch_of_its_own_source(folder: Path) -> None:
    data = training_data(folder)
    first, second = data.samples()
    alone = data.by_source[0]
    rows = [first.row(sample) for sample in range(600)]
    counts = Counter(row.source for row in rows)
    shares = {name: counts[number] / 600 for number, name in enumerate(data.names)}
    assert all(abs(shares[name] - WEIGHTS[name] / sum(WEIGHTS.values())) < 1 / 600 for name in data.names)
    for number, name in enumerate(data.names):
        own = [row for row in rows if row.source == number]
        assert all(row.tokens.equal(alone[name].row(index).tokens) for index, row in enumerate(own))
    assert [second.row(n).source for n in range(50)] == [row.source for row in rows[:50]]
    assert not all(second.row(n).tokens.equal(rows[n].tokens) for n in range(50)), "an order of its own"
    epochs = data.epochs(75)
    for number, name in enumerate(data.names):
        assert epochs[name] == pytest.approx(counts[number] / len(alone[name]))
    assert epochs["foreign"] > 1.5 and f"{54.05}% foreign, " in str(first)


@pytest.mark.parametrize(("replicas", "size"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_reads_the_same_samples_at_any_layout(folder: Path, replicas: int, size: int) -> None:
    samples = training_data(folder).samples()[0]
    batches = [
        read_batch(samples, 2000, index, rank, replicas, size)
        for index in range(8 // (replicas * size))
        for rank in range(replicas)
    ]
    expected = [samples.row(index) for index in range(2000, 2008)]
    assert torch.cat([batch.tokens for batch in batches]).equal(torch.stack([row.tokens for row in expected]))
    assert [source for batch in batches for source in batch.sources] == [row.source for row in expected]


def test_with_changed_weights_each_source_goes_on_where_it_was(folder: Path) -> None:
    before, now = training_data(folder), dict(code=0.1, text=0.7)  # foreign leaves
    after = training_data(folder, now)
    step, sample = 13, 13 * 8
    carried = after.carried(before.data, before.curriculum.phases, None, step)
    assert carried is not None and (carried.phase, carried.sample) == (0, sample)
    assert carried.consumed == before.mix().consumed(0, sample) and sum(carried.consumed.values()) == sample
    samples, alone = after.samples(carried)[0], after.by_source[0]
    rows = [samples.row(index) for index in range(sample, sample + 80)]
    for number, (name, count) in enumerate({"code": 10, "text": 70}.items()):
        own = [row for row in rows if row.source == number]
        assert len(own) == count
        first = carried.consumed[name]
        assert all(row.tokens.equal(alone[name].row(first + index).tokens) for index, row in enumerate(own))
    assert after.carried(after.data, after.curriculum.phases, carried, 20) == carried, "the same weights go on"
    added = before.carried(after.data, after.curriculum.phases, carried, 23)
    assert added is not None and added.consumed == {**carried.consumed, "code": carried.consumed["code"] + 10,
                                                    "text": carried.consumed["text"] + 70}  # fmt: skip
    # In a phase that begins, all begin; what was read before still counts.
    begun = after.carried(before.data, before.curriculum.phases, None, 100)
    read = before.mix().consumed(0, 800)
    assert begun == Carried(1, 0, {}, [read])
    assert after.epochs(100, begun) == {name: before.epochs(100)[name] for name in now}
    # A source that comes back has been read as often as before it left; shares of a phase that is over change no turn.
    back = before.carried(after.data, after.curriculum.phases, begun, 110)
    assert back == Carried(1, 80, dict(code=10, text=70), [read])
    assert before.epochs(110, back)["foreign"] == before.epochs(100)["foreign"] > 1.5
    other = [replace(before.curriculum.phases[0], blend_weights=dict(code=1)), before.curriculum.phases[1]]
    assert before.carried(before.data, other, None, 110) == Carried(1, 0, {}, [dict(code=800)])
    # Between one folder and a blend, which is only allowed where a phase begins, all are counted from there.
    alone = TrainingData(load(PreparedData, dict(path=str(folder / "code"))), before.curriculum.phases, 5)
    assert alone.carried(alone.data, before.curriculum.phases, None, 100) is None
    switched = alone.carried(before.data, before.curriculum.phases, None, 100)
    assert switched == Carried(1, 0, {}, [read]) and alone.epochs(100, switched) == {str(folder / "code"): 0.0}


def test_foreign_pairs_are_one_stream_with_documents(folder: Path) -> None:
    record = tokenizer_record(folder / "code")
    both, one = (ForeignStream(folder / "foreign" / name, record) for name in ("", "b.bin"))
    first = ForeignStream(folder / "foreign" / "a", record)
    assert both.num_tokens == first.num_tokens + one.num_tokens
    cut = first.num_tokens - 5
    assert both.read(cut, 20).tolist() == [*first.read(cut, 5).tolist(), *one.read(0, 15).tolist()]
    assert len(both.bounds()) == 61 and both.bounds()[-1] == both.num_tokens
    assert both.checksums().keys() == {"a", "b"} and first.checksums()["a"] == both.checksums()["a"]
    isolated = ForeignStream(folder / "foreign", record, "isolated")
    assert isolated.packed(S, 0).fill > 0.9
    assert foreign_prefixes(folder / "code") == foreign_prefixes(folder / "nothing") == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda pair: pair.with_suffix(".bin").unlink(), "a.bin is missing"),
        (lambda pair: pair.with_suffix(".bin").write_bytes(b"12"), "has 2 bytes, its index says"),
        (lambda pair: pair.with_suffix(".idx").write_bytes(b"MMIDIDX"), "is no index of a Megatron dataset"),
        (lambda pair: pair.with_suffix(".idx").write_bytes(pair.with_suffix(".idx").read_bytes()[:60]), "is cut off"),
        (poked(17, 6), "its type 6 is none"),
        (poked(-8, 24), "documents do not end where"),
        (poked(-8, 200), "do not follow each other"),
        (poked(-16, 200), "do not follow each other .*; restore it"),
        (poked(33, 255), "is cut off"),
    ],
    ids=["missing", "short", "header", "cut", "floats", "documents", "beyond", "unordered", "negative"],
)
def test_a_damaged_pair_is_named(folder: Path, tmp_path: Path, damage: Any, words: str) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / "foreign" / f"a{suffix}", tmp_path)
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=words):
        ForeignStream(tmp_path / "a", tokenizer_record(folder / "code")).bounds()


def test_every_source_is_validated_in_its_share_and_at_least_once(folder: Path) -> None:
    data = load(PreparedData, blend(folder))
    streams = open_sources(data, "validation")
    held_out = open_held_out(data, streams, S)
    batches = [list(validation_batches(held_out, 20, rank, 2, 2)) for rank in range(2)]
    seen = Counter(source for one in batches for source, batch in one for id_ in batch.sample_ids if id_ >= 0)
    assert seen == {"code": 6, "foreign": 11, "text": 3}
    only = load(PreparedData, dict(path=str(folder / "code")))
    alone = open_held_out(only, {only.path: streams["code"]}, S)
    places = held_out.spread(20)["code"]
    assert [held_out.row(place).tokens.tolist() for place in places] == [
        alone.row(place).tokens.tolist() for place in alone.spread(6)[str(folder / "code.txt")]
    ]
    assert [stream.prefix for stream in open_sources(data, "test").values()] == [folder / "text" / "test"]
    with pytest.raises(DataError, match=r"no split 'test', it holds train, validation; prepare with a test_ratio"):
        open_sources(only, "test")


def problems(folder: Path, tmp_path: Path, **data: Any) -> list[str]:
    """Return the lines that a training run with this data section gets before it starts."""
    phase = dict(name="one", sequence_length=S, global_batch=8, steps=100)
    manager = dict(exp_dir=str(tmp_path)) | data.pop("exp_manager", {})
    values = dict(data=data, curriculum=[phase | data.pop("phase", {})], exp_manager=manager)
    data.setdefault("validation_sequences", 4)
    try:
        load_run(PretrainConfig, values, Cluster(), is_main=True)
    except ConfigError as error:
        return [str(problem).replace(str(folder), "DIR") for problem in error.problems]
    return []


def test_a_blend_is_legal_however_it_is_written(folder: Path, tmp_path: Path) -> None:
    assert problems(folder, tmp_path, **blend(folder)) == []
    flat = ["0.3", str(folder / "code"), 0.7, str(folder / "foreign" / "a"), 1, str(folder / "foreign" / "b.bin")]
    assert problems(folder, tmp_path, blend=flat, tokenizer=str(folder / "code")) == []
    one = dict(path=str(folder / "foreign"), weight=3, tokenizer=str(folder / "code"), validation=str(folder / "held"))
    assert problems(folder, tmp_path, blend=[one], phase=dict(blend_weights=dict(foreign=1))) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({0: dict(weight=0)}, "data.blend.0.weight = 0.0: must be above 0; any number above 0, or leave"),
        ({0: dict(weight=-1)}, "data.blend.0.weight = -1.0: must be above 0"),
        ({0: dict(weight=float("nan"))}, "data.blend.0.weight = NaN: must be a finite number"),
        ({0: dict(weight=None)}, "data.blend.0.weight = null: missing, it has no default"),
        ({0: dict(weight=1e-9)}, "data.blend.0.weight = 1e-09: is less than a millionth of all weights"),
        ({0: dict(path="nowhere")}, "data.blend.0.path = \"nowhere\": does not exist; the nearest folder"),
        ({1: dict(name="code")}, "data.blend.1.name = \"code\": names must differ, and code stands for data.blend.0"),
        ({1: dict(path="DIR/code")}, "data.blend.1.name = null: names must differ"),
        ({1: dict(path="DIR/other")}, "is of another tokenizer (DIR/other) than the run (DIR/code)"),
        ({1: dict(path="DIR/tiny")}, "data.blend.1.path = \"DIR/tiny\": phase one: it holds"),
        ({1: dict(tokenizer="DIR/code")}, "data.blend.1.tokenizer = \"DIR/code\": is for what another tool wrote"),
        ({2: dict(tokenizer=None)}, "data.blend.2.tokenizer = null: is missing, and .bin/.idx do not say"),
        ({2: dict(tokenizer="DIR/foreign")}, "data.blend.2.tokenizer = \"DIR/foreign\": holds no tokenizer.json"),
        ({2: dict(tokenizer="DIR/other")}, "is of another tokenizer (DIR/other) than the run (DIR/code)"),
        ({2: dict(path="DIR/wide")}, "holds token id 70000, and its tokenizer has"),
        ({2: dict(path="DIR/code/train")}, "is a part of a prepared folder, whose loss mask"),
        ({2: dict(path="DIR/code/train.bin", tokenizer=None)}, "give the folder DIR/code, without tokenizer"),
        ({2: dict(on_end="stop")}, "data.blend.2.on_end = \"stop\": the 100 steps would read foreign"),
        ({2: dict(size=3)}, "data.blend.2.size = 3: unknown key"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_cannot_be_blended_is_named_before_work_starts(
    folder: Path, tmp_path: Path, changes: dict[int, dict[str, Any]], line: str
) -> None:
    entries = blend(folder)["blend"]
    for index, change in changes.items():
        entries[index] |= {name: value.replace("DIR", str(folder)) if isinstance(value, str) else value
                           for name, value in change.items()}  # fmt: skip
    (found,) = problems(folder, tmp_path, blend=entries)
    assert line in found and "; " in found


def test_one_of_path_and_blend_and_weights_of_a_phase(folder: Path, tmp_path: Path) -> None:
    both = problems(folder, tmp_path, **blend(folder), path=str(folder / "code"))
    assert both == ["data.path = \"DIR/code\": contradicts data.blend; give one of the two"]  # fmt: skip
    (unknown,) = problems(folder, tmp_path, **blend(folder), phase=dict(blend_weights=dict(text=1, cod=1)))
    assert unknown.startswith(
        "curriculum.0.blend_weights.cod = 1.0: is not a source of data.blend (code, text, foreign)"
    )
    (none,) = problems(folder, tmp_path, **blend(folder), phase=dict(blend_weights=dict(text=0)))
    assert none.startswith("curriculum.0.blend_weights = {\"text\": 0.0}: at least one weight must")  # fmt: skip
    assert problems(folder, tmp_path, blend=[0.3, str(folder / "code"), 0.7])[0].startswith(
        "data.blend.0 = 0.3: must be"
    )
    (repeats,) = problems(folder, tmp_path, path=str(folder / "text"), on_end="stop")
    assert repeats.startswith("data.on_end = \"stop\": the 100 steps would read DIR/text ")  # fmt: skip
    assert problems(folder, tmp_path, path=str(folder / "text"), on_end="stop", phase=dict(steps=10)) == []
    # A run that goes on may have read it with a smaller weight until now: judged by what it has read (run/resume.py).
    going_on = dict(path=str(folder / "text"), on_end="stop", exp_manager=dict(resume_if_exists=True))
    assert len(problems(folder, tmp_path, **going_on)) == 1, "nothing to go on from yet"
    (Path(load(TrainExpManagerConfig, dict(exp_dir=str(tmp_path))).run_dir) / "checkpoints/step_00000009").mkdir(
        parents=True
    )
    assert problems(folder, tmp_path, **going_on) == []


def test_checking_a_config_leaves_the_full_look_at_the_data_to_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    monkeypatch.setattr(manifest, "content_problem", lambda path, record, *, full: looks.append(full))
    once = dict(path=str(folder / "text"), verify="full", on_end="stop", packing="isolated", phase=dict(steps=10))
    assert problems(folder, tmp_path, **once) == [] and looks and not any(looks)
    assert problems(folder, tmp_path, **blend(folder, verify="full")) == [] and not any(looks)
    open_sources(load(PreparedData, dict(path=str(folder / "text"), verify="full")), "train")
    assert any(looks)


def test_a_weight_raised_late_is_judged_by_what_is_left_to_read(folder: Path) -> None:
    def config(weight: float) -> PretrainConfig:
        data = blend(folder)
        data["blend"][2] |= dict(weight=weight, on_end="stop")
        phase = dict(name="one", sequence_length=S, global_batch=8, steps=100)
        return load(PretrainConfig, dict(data=data, curriculum=[phase]))

    then, now = config_dict(config(0.01)), config(5)
    data = TrainingData(now.data, now.curriculum, now.seed)
    carried = carried_blend(TrainingState(98, now.seed, then, {}), now, data)
    assert carried is not None and carried.sample == 98 * 8 and data.epochs(100, carried)["foreign"] < 1
    with pytest.raises(ConfigError, match="would read foreign"):
        carried_blend(TrainingState(3, now.seed, then, {}), now, data)


def test_a_tokenizer_that_no_source_takes_is_named(folder: Path, tmp_path: Path) -> None:
    for data in (dict(path=str(folder / "code")), blend(folder)):
        (line,) = problems(folder, tmp_path, **data, tokenizer=str(folder / "code"))
        assert line.startswith('data.tokenizer = "DIR/code": is for .bin/.idx in data.blend that name none')


def test_the_sequences_of_a_calibration_are_counted_against_the_end_of_a_source(folder: Path) -> None:
    def found(num_sequences: int) -> list[str]:
        section = dict(num_sequences=num_sequences, sequence_length=S)
        values = dict(
            data=dict(path=str(folder / "text"), on_end="stop"), importance=section, init_from=dict(parent="P")
        )
        return [problem.field for problem in length_problems(load(ImportanceConfig, values))]

    assert (found(64), found(6400)) == ([], ["data.on_end"])


def test_a_stream_of_a_blend_is_that_of_the_folder(folder: Path) -> None:
    assert isinstance(open_sources(load(PreparedData, blend(folder)), "train")["code"], TokenStream)
