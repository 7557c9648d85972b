"""The prepared folder: recognised, never overwritten unasked, whole or absent after any failure."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic.corpus import prepare as prepare_module
from elastic.corpus import splits as splits_module
from elastic.corpus import workers as workers_module
from elastic.corpus.prepare import prepare
from elastic.data import manifest as manifest_module
from elastic.data.manifest import DataError, Manifest, checked_manifest, read_manifest
from elastic.data.tokens import TokenStream
from tests.unit.data.preparing import config, contents, texts, write_jsonl


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    write_jsonl(path, texts())
    return path


def test_same_call_again_is_recognised_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    first = prepare(config(source, tmp_path / "data"))
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(config(source, tmp_path / "data"))
    assert (first.already_prepared, second.already_prepared) == (False, True)
    assert second.manifest == first.manifest
    assert times == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 280}, "vocab_size was 300, now 280"),
        ({"validation_ratio": 0.2}, "validation_ratio was 0.1, now 0.2"),
        ({"max_bytes": 5000}, "max_bytes was None, now 5000"),
        ({}, "listing_sha256 was"),
    ],
)
def test_other_settings_or_source_are_refused_until_told_to_overwrite(
    source: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = tmp_path / "data"
    prepare(config(source, folder))
    before = contents(folder)
    if not changes:
        write_jsonl(source, texts()[1:])
    with pytest.raises(DataError, match=named):
        prepare(config(source, folder, **changes))
    assert contents(folder) == before
    assert not prepare(config(source, folder, **changes, overwrite=True)).already_prepared
    assert contents(folder) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source.jsonl"]


def test_folder_with_anything_else_in_it_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    prepare(config(source, tmp_path / "data"))  # an empty folder is free to take
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"thesis\.tex"):
            prepare(config(source, tmp_path / "data", vocab_size=290, overwrite=overwrite))
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DataError, match=r"source\.jsonl"):
        prepare(config(source, source, overwrite=True))


@pytest.mark.parametrize("name", ["train.bin", "validation.idx", "tokenizer.json", "data.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damaged_folder_is_not_taken_for_prepared(source: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "data"
    prepare(config(source, folder))
    before = contents(folder)
    content = bytearray(before[name])
    content[len(content) // 2] ^= 0x80
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(bytes(content) if damage == "flip" else before[name][:-1])
    if (name, damage) == ("data.json", "cut"):
        (folder / name).write_bytes(before[name][:-9])  # without its last line end it would still be whole
    with pytest.raises(DataError, match="overwrite=true"):
        prepare(config(source, folder))
    prepare(config(source, folder, overwrite=True))
    assert contents(folder) == before


KILLED_AT = ["train_tokenizer", "load_tokenizer", "encode", "record_file", "Manifest"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the child forks only to be killed
@pytest.mark.parametrize("step", KILLED_AT)
def test_kill_leaves_nothing_that_looks_whole(
    source: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        modules = (prepare_module, splits_module, workers_module)
        monkeypatch.setattr(next(module for module in modules if hasattr(module, step)), step, kill)
        try:
            prepare(config(source, tmp_path / "data"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    (left,) = tmp_path.glob(".data.partial-*")
    with pytest.raises(DataError, match=r"no data\.json"):
        read_manifest(left)
    assert not prepare(config(source, tmp_path / "data")).already_prepared


def test_error_while_replacing_keeps_the_old_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    prepare(config(source, folder))
    before = contents(folder)

    def disk_full(manifest: Manifest, place: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "write", disk_full)
    with pytest.raises(DataError, match=r"output_dir = .*No space left"):
        prepare(config(source, folder, vocab_size=290, overwrite=True))
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source.jsonl"]


def test_folder_that_appears_meanwhile_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"

    def another_finishes_first(path: Path) -> Any:
        if not folder.exists():
            shutil.copytree(path.parent, folder)
        return record_file(path)

    record_file = splits_module.record_file
    monkeypatch.setattr(splits_module, "record_file", another_finishes_first)
    with pytest.raises(DataError, match="not empty"):
        prepare(config(source, folder))
    assert "data.json" not in contents(folder)


@pytest.mark.parametrize("change", [lambda path: write_jsonl(path, texts()[:-1]), lambda path: path.unlink()])
def test_source_that_changes_while_it_is_read_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    def train_and_change(*args: Any) -> None:
        train_tokenizer(*args)
        change(source)

    train_tokenizer = prepare_module.train_tokenizer
    monkeypatch.setattr(prepare_module, "train_tokenizer", train_and_change)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(config(source, tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_output_through_a_link_stays_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    prepare(config(source, tmp_path / "data"))
    prepare(config(source, tmp_path / "data", vocab_size=290, overwrite=True))
    assert (tmp_path / "data").is_symlink()
    assert read_manifest(tmp_path / "disk").tokenizer.vocab_size == 290


def test_change_that_samples_miss_is_found_when_all_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of one byte make of a small file what one of many GiB is with blocks of 64 KiB: read here and there.
    monkeypatch.setattr(manifest_module, "SAMPLED_BLOCK_BYTES", 1)
    folder = tmp_path / "data"
    prepare(config(source, folder))
    before = contents(folder)
    content = bytearray(before["train.bin"])
    content[1] ^= 1
    (folder / "train.bin").write_bytes(content)
    TokenStream(folder / "train")
    checked_manifest(folder)
    with pytest.raises(DataError, match=r"train\.bin has the right size and another content"):
        checked_manifest(folder, verify="full")
    assert not prepare(config(source, folder, overwrite=True)).already_prepared
    assert contents(folder) == before
