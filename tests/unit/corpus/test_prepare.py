"""Preparing data: the same bytes each time, no document on both sides, every skipped document counted."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.console import Console
from tokenizers import Tokenizer, processors

from elastic.corpus.prepare import PrepareConfig, prepare
from elastic.data.manifest import DataError, SkipRecord, read_manifest
from elastic.data.tokenizer import load_tokenizer, train_tokenizer
from elastic.verbs import prepare_data
from elastic.verbs.prepare_data import run_prepare
from tests.unit.data.preparing import NUM_DOCUMENTS, config, contents, texts, write_jsonl


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    write_jsonl(path, texts())
    return path


def documents_of(folder: Path, split: str) -> list[str]:
    """Decode a split with Megatron's own reader, checking that each document ends in end-of-text."""
    tokenizer = load_tokenizer(folder)
    documents = []
    dataset = IndexedDataset(str(folder / split))  # it unmaps the file when it is collected, so it is kept
    for ids in dataset[:]:
        assert ids[-1] == tokenizer.eos_id
        documents.append(tokenizer.tokenizer.decode(ids[:-1].tolist()))
    return documents


def test_megatrons_reader_gives_back_every_document_once_with_its_end(source: Path, tmp_path: Path) -> None:
    manifest = prepare(config(source, tmp_path / "data")).manifest
    train, validation = (documents_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts())
    assert [text for text in texts() if text in set(train)] == train  # in the order of the source
    assert 0.04 < len(validation) / NUM_DOCUMENTS < 0.2
    for split, documents in (("train", train), ("validation", validation)):
        record = manifest.splits[split]
        assert record.num_documents == len(documents)
        assert record.text_bytes == sum(len(text.encode()) for text in documents)
        assert record.num_tokens == np.memmap(tmp_path / "data" / f"{split}.bin", np.dtype(manifest.dtype)).size


def test_two_runs_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(config(source, tmp_path / name))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == [
        "data.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.bin",
        "train.idx",
        "validation.bin",
        "validation.idx",
    ]


def test_split_depends_on_content_not_on_order_or_company(source: Path, tmp_path: Path) -> None:
    prepare(config(source, tmp_path / "data"))
    validation = set(documents_of(tmp_path / "data", "validation"))
    shuffled = random.Random(1).sample([*texts(), *(f"another {number}" for number in range(100))], k=300)
    write_jsonl(tmp_path / "shuffled.jsonl", shuffled)
    prepare(config(tmp_path / "shuffled.jsonl", tmp_path / "again"))
    assert set(documents_of(tmp_path / "again", "validation")) & set(texts()) == validation


def test_copies_of_a_document_never_stand_on_both_sides(source: Path, tmp_path: Path) -> None:
    write_jsonl(source, texts() * 2)
    once = prepare(config(source, tmp_path / "once")).manifest
    first_copy = SkipRecord(NUM_DOCUMENTS, f"{source}:{NUM_DOCUMENTS + 1}")
    assert (once.num_documents, once.skipped) == (NUM_DOCUMENTS, {"duplicate": first_copy})
    twice = prepare(config(source, tmp_path / "twice", skip_duplicates=False)).manifest
    assert (twice.num_documents, twice.skipped) == (2 * NUM_DOCUMENTS, {})
    train, validation = (set(documents_of(tmp_path / "twice", split)) for split in ("train", "validation"))
    assert not train & validation


def test_a_test_split_takes_from_training_alone_and_leaves_no_trace_where_there_is_none(
    source: Path, tmp_path: Path
) -> None:
    without = prepare(config(source, tmp_path / "without", test_ratio=0)).manifest
    assert "test_ratio" not in without.settings  # a folder from before there was such a setting is recognised
    manifest = prepare(config(source, tmp_path / "data", test_ratio=0.2)).manifest
    assert manifest.settings["test_ratio"] == 0.2 and list(manifest.splits) == ["train", "validation", "test"]
    train, validation, test = (set(documents_of(tmp_path / "data", name)) for name in manifest.splits)
    assert train | validation | test == set(texts())
    assert len(train) + len(validation) + len(test) == NUM_DOCUMENTS and 0.1 < len(test) / NUM_DOCUMENTS < 0.3
    assert validation == set(documents_of(tmp_path / "without", "validation"))
    assert prepare(config(source, tmp_path / "data", test_ratio=0.2)).already_prepared


@pytest.mark.parametrize(
    ("count", "ratio", "test"),
    [(2, 1e-9, 0), (2, 0.5, 0), (3, 1e-9, 0), (3, 0.5, 0), (8, 1e-9, 0), (3, 1e-9, 1e-9), (8, 1e-9, 0.4), (8, 0, 1e-9)],
)
def test_no_split_is_ever_empty(source: Path, tmp_path: Path, count: int, ratio: float, test: float) -> None:
    for start in range(0, 24, 8):
        write_jsonl(source, texts()[start : start + count])
        given = config(source, tmp_path / f"{start}", validation_ratio=ratio, test_ratio=test)
        splits = prepare(given).manifest.splits
        assert len(splits) == 1 + (ratio > 0) + (test > 0)
        assert all(record.num_documents > 0 for record in splits.values())
        assert sum(record.num_documents for record in splits.values()) == count
        for name, asked in (("validation", ratio), ("test", test)):
            assert not 0 < asked < 1e-6 or splits[name].num_documents == 1


def test_one_document_cannot_be_split_and_ratio_zero_makes_no_validation(source: Path, tmp_path: Path) -> None:
    write_jsonl(source, texts()[:1] * 3)
    with pytest.raises(DataError, match="validation_ratio=0"):
        prepare(config(source, tmp_path / "data"))
    manifest = prepare(config(source, tmp_path / "data", validation_ratio=0)).manifest
    assert list(manifest.splits) == ["train"]
    assert not list((tmp_path / "data").glob("validation*"))
    with pytest.raises(DataError, match=r"test_ratio = 0.3: the 3 documents .* leave it none .* set test_ratio=0"):
        prepare(config(source, tmp_path / "tested", test_ratio=0.3, validation_ratio=0, skip_duplicates=False))


def test_tokenizer_never_sees_held_out_documents(source: Path, tmp_path: Path) -> None:
    # Each document repeats a word of its own: a word the trainer counted becomes one token, others stay in pieces.
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(40)]
    write_jsonl(source, [f" {word}" * 200 for word in words])
    prepare(config(source, tmp_path / "data", vocab_size=2000, validation_ratio=0.3, test_ratio=0.2))
    tokenizer = load_tokenizer(tmp_path / "data").tokenizer
    for split, whole in (("train", True), ("validation", False), ("test", False)):
        for text in documents_of(tmp_path / "data", split):
            assert (len(tokenizer.encode(text[:9]).ids) == 1) == whole


def test_tokenizer_sample_is_bounded_and_spread_over_the_corpus(source: Path, tmp_path: Path) -> None:
    # 400 documents of 4 kB with a word of their own each; about a tenth of them fit in the sample.
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(400)]
    write_jsonl(source, [f" {word}" * 450 for word in words])
    settings = {"vocab_size": 5000, "validation_ratio": 0, "tokenizer_sample_bytes": 160_000}
    prepare(config(source, tmp_path / "data", **settings))
    tokenizer = load_tokenizer(tmp_path / "data").tokenizer
    seen = [number for number, word in enumerate(words) if len(tokenizer.encode(f" {word}").ids) == 1]
    assert 20 <= len(seen) <= 45
    assert min(seen) < 100 and max(seen) > 300


def test_tokenizer_is_trained_on_something_even_when_every_document_misses_the_sample(
    source: Path, tmp_path: Path
) -> None:
    prepared = prepare(config(source, tmp_path / "data", tokenizer_sample_bytes=1))
    assert prepared.manifest.tokenizer.vocab_size > 257


def test_given_tokenizer_is_copied_and_used(source: Path, tmp_path: Path) -> None:
    first = prepare(config(source, tmp_path / "first"))
    given = config(source, tmp_path / "second", tokenizer_path=str(tmp_path / "first"))
    second = prepare(given)
    assert (first.manifest.tokenizer.trained, second.manifest.tokenizer.trained) == (True, False)
    for name, content in contents(first.folder).items():
        assert name == "data.json" or contents(second.folder)[name] == content
    assert prepare(given).already_prepared
    content = json.loads((tmp_path / "first" / "tokenizer_config.json").read_text())
    (tmp_path / "first" / "tokenizer_config.json").write_text(json.dumps(content | {"pad_token": None}))
    with pytest.raises(DataError, match="tokenizer_fingerprint was"):
        prepare(given)


def test_skipped_documents_stand_in_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for number, text in enumerate(texts()):
        (folder / f"{number}.py").write_text(text)
    bad = {"empty": b"", "binary": b"\0", "invalid_utf8": b"\xff", "too_large": b"x" * 9999, "duplicate": b""}
    for name, content in bad.items():
        (folder / f"{name}.py").write_bytes(content or (texts()[0].encode() if name == "duplicate" else b""))
    (folder / "loop").symlink_to(folder)
    (folder / "gone.py").symlink_to(folder / "nowhere")
    settings = config(folder, tmp_path / "data", document_format="text", max_document_bytes=9998)
    manifest = prepare(settings).manifest
    assert manifest.num_documents == NUM_DOCUMENTS
    paths = {name: folder / f"{name}.py" for name in bad} | {"unreadable": folder / "gone.py"}
    # Of two copies the first in the order of names stays, which here is one of the numbers.
    assert manifest.skipped == {
        reason: SkipRecord(1, str(path)) for reason, path in (paths | {"folder_seen": folder / "loop"}).items()
    }
    assert manifest == read_manifest(tmp_path / "data")


def test_corpus_without_a_usable_document_is_an_error_that_says_why(source: Path, tmp_path: Path) -> None:
    source.write_text('{"a": 1}\n{"a": 2}\n\n')
    with pytest.raises(
        DataError, match=rf"skipped: 1 empty \(first {source}:3\), 2 missing_field \(first {source}:1\)"
    ):
        prepare(config(source, tmp_path / "data"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.jsonl"]


def test_a_folder_whose_files_are_all_passed_over_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "chats").mkdir()
    write_jsonl(tmp_path / "chats" / "a.jsonl", texts())
    with pytest.raises(DataError, match=r"skipped: 1 json_lines_not_read_as_text .*set document_format=jsonl"):
        prepare(config(tmp_path / "chats", tmp_path / "data", document_format="text"))
    (tmp_path / "chats" / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    with pytest.raises(DataError, match=r"skipped: 1 chat_messages .*for chats set document_format=chat"):
        prepare(config(tmp_path / "chats", tmp_path / "data"))


def test_begin_of_text_is_in_the_manifest_and_in_front_of_every_document(source: Path, tmp_path: Path) -> None:
    train_tokenizer(texts(), 300, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(path))
    given = config(source, tmp_path / "data", tokenizer_path=str(tmp_path / "tokenizer"))
    prepared = prepare(given)
    assert prepared.manifest.tokenizer.bos_ids == (begin,)
    assert read_manifest(tmp_path / "data") == prepared.manifest
    for split in ("train", "validation"):
        dataset = IndexedDataset(str(tmp_path / "data" / split))
        documents = [dataset[index] for index in range(len(dataset))]
        assert documents and all(document[0] == begin and begin not in document[1:] for document in documents)
    with pytest.raises(DataError, match="add_bos was auto, now False"):
        prepare(replace(given, add_bos=False))
    assert f"every document begins with the tokenizer's own [{begin}]" in shown(given)
    plain = replace(given, output_dir=str(tmp_path / "plain"), add_bos=False)
    assert "begins with" not in shown(plain) and read_manifest(tmp_path / "plain").tokenizer.bos_ids == ()
    dataset = IndexedDataset(str(tmp_path / "plain" / "train"))
    assert not any(begin in dataset[index] for index in range(len(dataset)))


def shown(settings: PrepareConfig) -> str:
    """Run the verb and return what stands on the screen."""
    screen = io.StringIO()
    run_prepare(settings, Console(file=screen, width=500))
    return screen.getvalue()


def test_what_was_left_out_stands_on_the_screen_and_how_far_a_large_corpus_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(source.read_bytes())
    (folder / "b.md").write_text("no lines of JSON")
    everything = shown(config(folder, tmp_path / "all"))
    assert f"skipped: 1 other_suffix (first {folder / 'b.md'})" in everything and "stopped" not in everything
    part = shown(config(folder, tmp_path / "part", max_bytes=9000))
    assert "stopped at max_bytes = 9,000: there are more documents" in part and "200 documents" not in part
    assert "skipped: nothing" in shown(config(source, tmp_path / "one")) and "read " not in everything
    monkeypatch.setattr(prepare_data, "MINUTES_BYTES", 1)
    assert shown(config(source, tmp_path / "large")).count("read 0 MB of about 0, for everything is read twice") == 2


def test_all_illegal_settings_are_named_in_one_error(tmp_path: Path) -> None:
    wrong = PrepareConfig(
        output_dir="",
        paths=[str(tmp_path / "nowhere")],
        document_format="parquet",
        text_field="",
        suffixes=[],
        max_bytes=0,
        max_document_bytes=0,
        validation_ratio=1.5,
        tokenizer_path=str(tmp_path),
        vocab_size=100,
        tokenizer_sample_bytes=-1,
    )
    with pytest.raises(DataError) as caught:
        prepare(wrong)
    for problem in [
        "output_dir = null: missing",
        'nowhere": must exist; give a file, a folder',
        'document_format = "parquet": must be one of text, lines, jsonl',
        "text_field = null: missing",
        "suffixes = []",
        "max_bytes = 0: must be at least 1; nearest legal value is 1",
        "max_document_bytes = 0",
        "validation_ratio = 1.5: must be at most 0.5; nearest legal value is 0.5",
        "vocab_size = 100: must be at least 257; nearest legal value is 257",
        "tokenizer_sample_bytes = -1",
        "must be a folder with tokenizer.json",
    ]:
        assert problem in str(caught.value)


def test_output_inside_the_source_is_refused_and_the_defaults_are_legal(tmp_path: Path) -> None:
    (problem,) = PrepareConfig(output_dir=str(tmp_path / "a" / "b"), paths=[str(tmp_path)]).problems()
    assert "must lie outside the source" in problem.rule
    assert PrepareConfig(output_dir=str(tmp_path)).problems() == ()
