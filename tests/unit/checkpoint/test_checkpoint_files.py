"""Manifest, search and pruning, on folders made by hand; real checkpoints: tests/distributed."""

import ast
import errno
import hashlib
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic.checkpoint
from elastic.checkpoint.contents import (
    ALWAYS_HASHED_BYTES,
    CONTENTS_FILE,
    CheckpointError,
    StoredFile,
    damages,
    read_contents,
    write_contents,
)
from elastic.checkpoint.find import list_checkpoints, newest_whole, resolve_checkpoint, set_aside_newer
from elastic.checkpoint.record import RECORD_FILE
from elastic.train.callbacks import prune
from elastic.world.files import explained, hashed_file

LARGE = ALWAYS_HASHED_BYTES + 4096


def checkpoint(run: Path, step: int) -> Path:
    """Make a folder with a manifest: a record, a file in a folder below, a large file."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    (folder / "below").mkdir(parents=True)
    (folder / RECORD_FILE).write_text(f'{{"step": {step}}}\n')
    (folder / "below" / "settings.json").write_text("{}")
    (folder / "__0_0.distcp").write_bytes(bytes(step % 256 for _ in range(LARGE)))
    write_contents(folder, {})
    return folder


def flip(path: Path, offset: int) -> None:
    """Change one byte, not the size."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x41
    path.write_bytes(content)


def test_the_manifest_lists_every_file_with_size_and_sha256(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    content = json.loads((folder / CONTENTS_FILE).read_text())
    assert set(content["files"]) == {RECORD_FILE, "below/settings.json", "__0_0.distcp"}
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert damages(folder, full=True) == []


def test_sizes_alone_find_everything_but_a_change_inside_a_large_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    flip(folder / "__0_0.distcp", LARGE // 2)
    assert damages(folder, full=False) == []
    (problem,) = damages(folder, full=True)
    assert problem.startswith("__0_0.distcp has checksum ") and "the manifest says" in problem
    flip(folder / "__0_0.distcp", LARGE // 2)
    flip(folder / "below" / "settings.json", 1)
    assert damages(folder, full=False)[0].startswith("below/settings.json has checksum")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / RECORD_FILE).unlink(), "record.json is missing"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b""), "has 0 bytes, the manifest says 1,052,672"),
        (lambda folder: (folder / "common.pt").write_bytes(b"x"), "common.pt is not in manifest.json"),
        (lambda folder: (folder / "below" / "more").touch(), "below/more is not in manifest.json"),
        (lambda folder: (folder / CONTENTS_FILE).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / CONTENTS_FILE).write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / CONTENTS_FILE).write_text('{"files": {"a": 3}}'), "manifest.json is damaged"),
        (lambda folder: (folder / CONTENTS_FILE).write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda folder: ((folder / RECORD_FILE).unlink(), os.mkfifo(folder / RECORD_FILE)), "is no regular file"),
    ],
)
def test_sizes_alone_find(change: Any, said: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    change(folder)
    assert any(said in problem for problem in damages(folder, full=False))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_that_leads_out_of_the_folder_is_damaged(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    text = (folder / CONTENTS_FILE).read_text().replace(f'"{RECORD_FILE}"', json.dumps(name))
    (folder / CONTENTS_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_contents(folder)


def test_every_byte_of_the_manifest_matters(tmp_path: Path) -> None:
    """The manifest has no checksum of its own: blanks and key names must not be free to change either."""
    folder = checkpoint(tmp_path, 1)
    good = (folder / CONTENTS_FILE).read_bytes()
    for offset in range(len(good)):
        for mask in (0x01, 0x29):  # 0x29 turns a blank into a tab, which JSON does not mind
            (folder / CONTENTS_FILE).write_bytes(good[:offset] + bytes([good[offset] ^ mask]) + good[offset + 1 :])
            assert damages(folder, full=False) or damages(folder, full=True), f"byte {offset}"


def test_a_file_that_did_not_arrive_keeps_a_manifest_from_being_written(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("x")
    with pytest.raises(CheckpointError, match=r"__7_0.distcp is missing; is it on a disk that all nodes share\?"):
        write_contents(tmp_path, {"__7_0.distcp": StoredFile(12, "0" * 64)})


def test_the_newest_whole_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    first, second, third = (checkpoint(tmp_path, step) for step in (5, 90, 1000))
    (tmp_path / "checkpoints" / "step_00002000.writing").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00002000")  # nobody's pointer is trusted
    assert list_checkpoints(tmp_path) == [first, second, third]
    assert resolve_checkpoint(tmp_path, full=True) == third
    (third / RECORD_FILE).unlink()
    flip(second / "__0_0.distcp", 7)
    heard: list[str] = []
    assert newest_whole(tmp_path, full=True, say=heard.append) == first
    assert [line.partition(" is not whole: ")[0] for line in heard] == [
        "passed over: step_00001000",
        "passed over: step_00000090",
    ]
    assert "record.json is missing" in heard[0] and "__0_0.distcp has checksum" in heard[1]
    assert newest_whole(tmp_path, full=False) == second, "sizes do not show a flipped byte"
    (first / "__0_0.distcp").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no whole checkpoint\. step_00001000 .*step_00000005 is not whole"
    ):
        newest_whole(tmp_path, full=True)


def test_a_run_is_named_without_its_version_where_there_is_one(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "parent" / "version_0", 5)
    (tmp_path / "parent" / "version_1").mkdir()  # nothing was saved there
    assert resolve_checkpoint(tmp_path / "parent", full=True) == first
    second = checkpoint(tmp_path / "parent" / "version_1", 9)
    with pytest.raises(CheckpointError, match="holds several runs: version_0, version_1; choose one of them"):
        resolve_checkpoint(tmp_path / "parent")
    assert resolve_checkpoint(second.parent.parent) == second


def test_a_named_checkpoint_that_is_broken_names_the_nearest_whole_one(tmp_path: Path) -> None:
    first, second, third = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    (second / RECORD_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"record.json is missing; the nearest whole one is {first}"):
        resolve_checkpoint(second)
    (first / CONTENTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"the nearest whole one is {third}"):
        resolve_checkpoint(second)
    (third / "below" / "settings.json").unlink()
    with pytest.raises(CheckpointError, match="its run has no other whole one"):
        resolve_checkpoint(second)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_broken_ones_after_the_one_resumed_from_are_set_aside_not_deleted(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    heard: list[str] = []
    set_aside_newer(first, heard.append)
    checkpoint(tmp_path, 2)
    set_aside_newer(first, heard.append)
    assert sorted(path.name for path in second.parent.iterdir()) == [
        "step_00000001",
        "step_00000002.broken",
        "step_00000002.broken2",
    ]
    assert len(heard) == 2 and list_checkpoints(tmp_path) == [first]


def test_pruning_keeps_the_newest_milestones_and_what_is_broken(tmp_path: Path) -> None:
    folders = {step: checkpoint(tmp_path, step) for step in (2, 4, 6, 8, 10, 12)}
    (folders[10] / RECORD_FILE).unlink()
    (tmp_path / "checkpoints" / "step_00000001.removing").mkdir()  # a run was killed while it removed this one
    prune(tmp_path, folders[12], 2, 4, pytest.fail)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (4, 8, 10, 12)
    ]


def test_nothing_is_pruned_while_the_new_one_is_not_whole(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, step) for step in (1, 2, 3)]
    (folders[-1] / "__0_0.distcp").unlink()
    heard: list[str] = []
    prune(tmp_path, folders[-1], 1, None, heard.append)
    assert list_checkpoints(tmp_path) == folders and "older checkpoints stay" in heard[0]


def test_what_a_full_disk_does_not_take_is_raised_as_what_it_is(small_disk: Path) -> None:
    """Through torch's C++ writer, which on its own turns it into `PytorchStreamWriter failed writing file`."""
    with pytest.raises(OSError) as caught, hashed_file(small_disk / "file") as stream:
        torch.save(torch.zeros(4 << 20), stream)
    assert caught.value.errno == errno.ENOSPC
    assert str(small_disk / "file") in explained(caught.value, small_disk) and "free space" in str(
        explained(caught.value, small_disk)
    )


def test_what_was_hashed_while_written_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    with hashed_file(tmp_path / "file") as stream:
        torch.save(torch.arange(100_000), stream)
        torch.save({"a": 1}, stream)
    assert stream.sha256() == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_a_limit_on_file_sizes_is_raised_as_what_it_is(tmp_path: Path) -> None:
    with limited_file_size(1 << 20), pytest.raises(OSError) as caught, hashed_file(tmp_path / "file") as stream:
        stream.write(bytes(3 << 20))
        assert stream.write(bytes(10)) == 10, "torch must not notice"
    assert caught.value.errno == errno.EFBIG and "ulimit -f" in explained(caught.value, tmp_path)


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """Limit how large a file this process may write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_the_room_uses_no_private_name_of_another_package() -> None:
    """What another package keeps for itself it may change any day; checkpoints are to be read for years."""
    files = sorted(Path(elastic.checkpoint.__file__).parent.glob("*.py"))
    imported = [
        f"{file.name}: {node.module}.{alias.name}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
        if any(part.startswith("_") for part in (*node.module.split("."), alias.name))
    ]
    assert len(files) > 5 and imported == []
