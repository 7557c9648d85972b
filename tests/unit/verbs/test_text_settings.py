"""Settings and tokenizer of a checkpoint: an import's own, then the prepared data's."""

from pathlib import Path

import pytest

from elastic.checkpoint.record import Record
from elastic.hf.carried import Carried, write_carried
from elastic.hf.config import HfSettings
from elastic.hf.folder import HfFolder, open_hf_folder
from elastic.verbs.text_settings import text_settings
from tests.unit.config.configs import written_manifest
from tests.unit.hf.hf_folders import SHAPE, good_folder

MADE_HERE = HfSettings(bos_token_id=None, eos_token_id=0, pad_token_id=0)


@pytest.fixture
def source(tmp_path: Path) -> HfFolder:
    return open_hf_folder(good_folder(tmp_path / "model", max_position_embeddings=131072, chunk_size=64))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return written_manifest(tmp_path / "data")


def imported(source: HfFolder, tmp_path: Path, tokenizer: bool = True) -> Path:
    carried = Carried.of(source)
    write_carried(carried if tokenizer else Carried(carried.settings, carried.dtypes), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_data_that_the_user_names_gives_the_tokenizer_and_changes_no_setting(
    source: HfFolder, data: str, tmp_path: Path
) -> None:
    checkpoint = imported(source, tmp_path)
    record = Record("parent", SHAPE, data=data)
    assert text_settings(checkpoint, record) == (source.settings, checkpoint / "hugging_face")
    assert text_settings(checkpoint, record, data) == (source.settings, Path(data))


def test_an_import_without_a_tokenizer_takes_that_of_the_data_it_was_trained_on(
    source: HfFolder, data: str, tmp_path: Path
) -> None:
    checkpoint = imported(source, tmp_path, tokenizer=False)
    assert text_settings(checkpoint, Record("parent", SHAPE)) == (source.settings, None)
    assert text_settings(checkpoint, Record("parent", SHAPE, data=data)) == (source.settings, Path(data))


def test_a_parent_made_here_has_the_settings_of_its_data(data: str, tmp_path: Path) -> None:
    assert text_settings(tmp_path, Record("parent", SHAPE, data=data)) == (MADE_HERE, Path(data))
    assert text_settings(tmp_path, Record("parent", SHAPE)) == (HfSettings(), None)
