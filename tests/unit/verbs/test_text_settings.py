"""Settings and tokenizer of a checkpoint: an import's own, then the prepared data's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic.blend.sources import tokenizer_folder
from elastic.checkpoint.record import Record
from elastic.config.load import load
from elastic.config.sections import PreparedData
from elastic.hf.config import generation_config
from elastic.hf.export_settings import HfSettings, write_export_settings
from elastic.hf.folder import HfFolder, open_hf_folder
from elastic.verbs.text import LONGEST, text_settings
from tests.parity.hf_models import stock_model, tiny
from tests.unit.config.configs import DATA_TOKENS, written_manifest
from tests.unit.hf.hf_folders import SHAPE, good_folder

MADE_HERE = HfSettings(bos_token_id=None, eos_token_id=0, pad_token_id=0)


@pytest.fixture
def source(tmp_path: Path) -> HfFolder:
    return open_hf_folder(good_folder(tmp_path / "model", max_position_embeddings=131072, chunk_size=64))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return written_manifest(tmp_path / "data")


def imported(source: HfFolder, tmp_path: Path, tokenizer: bool = True) -> Path:
    exports = source.exports if tokenizer else replace(source.exports, tokenizer_files=())
    write_export_settings(exports, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_data_that_the_user_names_gives_the_tokenizer_and_changes_no_setting(
    source: HfFolder, data: str, tmp_path: Path
) -> None:
    checkpoint = imported(source, tmp_path)
    record = Record("parent", SHAPE, data=data)
    assert text_settings(checkpoint, record) == (source.exports.settings, checkpoint / "hugging_face")
    assert text_settings(checkpoint, record, data) == (source.exports.settings, Path(data))


def test_a_model_trained_on_chats_keeps_their_template(source: HfFolder, data: str, tmp_path: Path) -> None:
    manifest = json.loads((Path(data) / "data.json").read_text())
    manifest["settings"]["document_format"] = "chat"
    (Path(data) / "data.json").write_text(json.dumps(manifest))
    checkpoint = imported(source, tmp_path)
    assert text_settings(checkpoint, Record("parent", SHAPE, data=data)) == (source.exports.settings, Path(data))
    gone = Record("parent", SHAPE, data=str(tmp_path / "gone"))
    assert text_settings(checkpoint, gone) == (source.exports.settings, checkpoint / "hugging_face")
    blend = [dict(path=str(tmp_path / "text"), weight=1), dict(path=data, weight=1)]
    assert tokenizer_folder(load(PreparedData, dict(blend=blend))) == Path(data)


def test_an_import_without_a_tokenizer_takes_that_of_the_data_it_was_trained_on(
    source: HfFolder, data: str, tmp_path: Path
) -> None:
    checkpoint = imported(source, tmp_path, tokenizer=False)
    assert text_settings(checkpoint, Record("parent", SHAPE)) == (source.exports.settings, None)
    assert text_settings(checkpoint, Record("parent", SHAPE, data=data)) == (source.exports.settings, Path(data))


def test_a_parent_made_here_has_the_settings_of_its_data(data: str, tmp_path: Path) -> None:
    assert text_settings(tmp_path, Record("parent", SHAPE, data=data)) == (MADE_HERE, Path(data))
    assert text_settings(tmp_path, Record("parent", SHAPE)) == (HfSettings(), None)


def test_ids_that_only_fill_the_vocabulary_up_are_never_generated(data: str, tmp_path: Path) -> None:
    shape = SHAPE.with_vocab(DATA_TOKENS + 3)
    settings, _ = text_settings(tmp_path, Record("parent", shape, data=data))
    suppressed = generation_config(settings, shape)["suppress_tokens"]
    assert suppressed == [DATA_TOKENS, DATA_TOKENS + 1, DATA_TOKENS + 2]
    model = stock_model(replace(tiny("M*-"), vocab=shape.vocab))
    model.lm_head.weight.data[DATA_TOKENS:] *= 100  # by far the likeliest wherever they are positive
    free, bound = (
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=20, do_sample=False, suppress_tokens=tokens)
        for tokens in (None, suppressed)
    )
    assert (free >= DATA_TOKENS).any() and not (bound >= DATA_TOKENS).any()


def test_special_tokens_are_those_that_the_tokenizer_names(data: str, tmp_path: Path) -> None:
    added = [{"id": number, "content": text} for number, text in ((4, "<s>"), (6, "<pad>"))]
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": added}
    (Path(data) / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = {"bos_token": "<s>", "pad_token": {"content": "<pad>"}, "unk_token": "a"}
    (Path(data) / "tokenizer_config.json").write_text(json.dumps(named))
    settings, _ = text_settings(tmp_path, Record("parent", SHAPE, data=data))
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (4, 0, 6)


@pytest.mark.parametrize(("trained", "imported_says", "expected"), [(512, 131072, 131072), (262144, 131072, 262144)])
def test_exports_say_the_longest_sequence(
    source: HfFolder, data: str, trained: int, imported_says: int, expected: int, tmp_path: Path
) -> None:
    record = Record("elastic", SHAPE, data=data, provenance={LONGEST: str(trained)})
    assert text_settings(tmp_path / "none", record)[0].max_position_embeddings == trained
    assert source.exports.settings.max_position_embeddings == imported_says
    assert text_settings(imported(source, tmp_path), record)[0].max_position_embeddings == expected
