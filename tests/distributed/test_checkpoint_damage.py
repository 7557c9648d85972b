"""A damaged checkpoint of a real run of two ranks is noticed, named and passed over, whatever was damaged."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic.checkpoint.contents import (
    ALWAYS_HASHED_BYTES,
    CONTENTS_FILE,
    CheckpointError,
    damages,
    read_contents,
    write_contents,
)
from elastic.checkpoint.find import checkpoint_folder, list_checkpoints, newest_whole, resolve_checkpoint
from elastic.checkpoint.read import METADATA_FILE
from tests.distributed.harness import run_distributed
from tests.distributed.training import elastic_values, rows, train

TWO = dict(tensor=2)
FLIPS_PER_FILE = 12


@pytest.fixture(scope="module")
def pair(start: Path) -> Path:
    """Train on two ranks, stopped after step 6: checkpoints at 3 and 6."""
    values = elastic_values(start, "damaged", parallel=TWO, trainer=dict(max_steps=6))
    run_distributed(train, 2, values)
    return start


Change = Callable[[bytes], bytes | None]


def flipped(offset: int) -> Change:
    return lambda data: data[:offset] + bytes([data[offset] ^ (1 << offset % 8)]) + data[offset + 1 :]


def changes(folder: Path) -> Iterator[tuple[str, str, Change]]:
    """List (file, what is done, how) for every file: bytes flipped all over it, cut, emptied, removed, lengthened."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(folder)), path.stat().st_size
        offsets = {(size - 1) * number // (FLIPS_PER_FILE - 1) for number in range(FLIPS_PER_FILE)}
        for offset in sorted(offsets):
            yield name, f"bit flipped at {offset} of {size}", flipped(offset)
        for length in (size - 1, size // 2, 0):
            yield name, f"cut to {length} of {size}", lambda data, length=length: data[:length]
        yield name, "lengthened", lambda data: data + b"\0"
        yield name, "removed", lambda _data: None
        yield name, "zeros", lambda data: bytes(len(data))


@contextmanager
def changed(path: Path, change: Change) -> Iterator[None]:
    """Damage a file for a while."""
    good = path.read_bytes()
    damaged = change(good)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(good)


def test_every_damage_is_detected_and_the_previous_checkpoint_used(pair: Path) -> None:
    run = pair / "run" / "damaged"
    older, newest = list_checkpoints(run)
    files = {path.name for path in newest.iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", METADATA_FILE, "router.safetensors", "record.json", "state.json"} < files
    cases = list(changes(newest))
    assert len(cases) >= 100
    for name, what, change in cases:
        heard: list[str] = []
        with changed(newest / name, change):
            assert newest_whole(run, full=True, say=heard.append) == older, f"{name} {what}"
        # A manifest with another digit of a checksum in it looks like a damaged file.
        named = name if name != CONTENTS_FILE else ""
        assert heard and f"{newest.name} is not whole: {named}" in heard[0], f"{name} {what}: {heard}"
    assert newest_whole(run, full=True, say=pytest.fail) == newest


def test_swapped_and_foreign_files_are_detected(pair: Path) -> None:
    run = pair / "run" / "damaged"
    older, newest = list_checkpoints(run)
    first, second = newest / "__0_0.distcp", newest / "__1_0.distcp"
    swapped = {first: second.read_bytes(), second: first.read_bytes()}
    with changed(first, lambda _data: swapped[first]), changed(second, lambda _data: swapped[second]):
        assert resolve_checkpoint(run, full=True) == older
    for name in (first.name, second.name, METADATA_FILE):
        earlier = (older / name).read_bytes()  # of the same size
        with changed(newest / name, lambda _data, earlier=earlier: earlier):
            assert resolve_checkpoint(run, full=True) == older, name
    assert resolve_checkpoint(run, full=True) == newest


def verify_together(folder: Path) -> list[str]:
    """Verify with all ranks sharing the work; returns what this rank was told."""
    import torch

    from elastic.world.groups import Layout, join_world

    return damages(folder, full=True, world=join_world(Layout(), torch.device("cpu")))


def test_ranks_share_the_checking_and_are_told_the_same(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(bytes(ALWAYS_HASHED_BYTES + number + 1))
    write_contents(tmp_path, {})
    assert run_distributed(verify_together, 2, tmp_path) == [[], []]
    damaged = {"0", "3", "4"}  # both ranks have some of them
    for name in damaged:
        (tmp_path / name).write_bytes(flipped(int(name))((tmp_path / name).read_bytes()))
    first, second = run_distributed(verify_together, 2, tmp_path)
    assert first == second and {problem.split()[0] for problem in first} == damaged


def test_a_resumed_run_goes_on_from_the_previous_one_as_if_nothing_were(pair: Path) -> None:
    """A flipped bit in the newest checkpoint costs the steps since the one before it, and nothing else."""
    shutil.copytree(pair / "run" / "damaged", pair / "run" / "flipped")
    newest = checkpoint_folder(pair / "run" / "flipped", 6)
    path = newest / "__1_0.distcp"
    path.write_bytes(flipped(path.stat().st_size // 2)(path.read_bytes()))
    run_distributed(train, 2, elastic_values(pair, "flipped", parallel=TWO))
    before, after = rows(pair, "damaged"), rows(pair, "flipped")
    for name in ("validation/full/loss", "validation/half/loss", "validation/counted_tokens"):
        before[6].pop(name)  # it ended there: the step that is made again is in the midst of a run
    assert 9 in after and {step: after[step] for step in before} == before
    logged = (pair / "run" / "flipped" / "metrics.jsonl").read_text()
    assert logged.count('{"step": 4, "phase"') == 1, "the steps that were made again are logged once"
    assert (newest.parent / "step_00000006.broken" / CONTENTS_FILE).is_file(), "for a look at what happened"
    assert [path.name for path in list_checkpoints(pair / "run" / "flipped")] == ["step_00000006", "step_00000009"]


def test_a_run_without_a_whole_checkpoint_says_so_and_leaves_them(pair: Path) -> None:
    shutil.copytree(pair / "run" / "damaged", pair / "run" / "hopeless")
    folders = list_checkpoints(pair / "run" / "hopeless")
    for folder in folders:
        (folder / "state.json").unlink()
    with pytest.raises(Exception, match=r"holds no whole checkpoint\. step_00000006 is not whole: state.json is missi"):
        run_distributed(train, 1, elastic_values(pair, "hopeless"))
    assert list_checkpoints(pair / "run" / "hopeless") == folders


def test_a_verb_falls_back_too_and_refuses_one_named_by_hand(pair: Path) -> None:
    from elastic.config.inputs import MembersInput
    from elastic.verbs.members import open_checkpoint

    shutil.copytree(pair / "run" / "damaged", pair / "run" / "read")
    older, newest = list_checkpoints(pair / "run" / "read")
    (newest / "router.safetensors").write_bytes(b"")
    heard: list[str] = []
    family = open_checkpoint(MembersInput(checkpoint=str(pair / "run" / "read")), None, (), say=heard.append)
    assert family.checkpoint == older and "router.safetensors has 0 bytes" in heard[0]
    with pytest.raises(CheckpointError, match=f"router.safetensors has 0 bytes.*the nearest whole one is {older}"):
        open_checkpoint(MembersInput(checkpoint=str(newest)), None, ())


def test_a_save_in_the_background_is_the_same_save(pair: Path) -> None:
    """Training goes on while it is written, and changes the very tensors."""
    values = elastic_values(
        pair, "background", parallel=TWO, trainer=dict(max_steps=6), exp_manager=dict(async_save=True)
    )
    run_distributed(train, 2, values)
    assert rows(pair, "background") == rows(pair, "damaged")
    pairs = list(zip(*(list_checkpoints(pair / "run" / v) for v in ("damaged", "background")), strict=True))
    assert len(pairs) == 2
    for foreground, background in pairs:
        expected, found = read_contents(foreground), read_contents(background)
        assert expected.keys() == found.keys() and not damages(background, full=True)
        # The index carries a random id, the state the config with the name of the run.
        same = [name for name in expected if name not in (".metadata", "state.json")]
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}, foreground
    logged = [json.loads(line) for line in (pair / "run" / "background" / "metrics.jsonl").read_text().splitlines()]
    saves = [row for row in logged if "checkpoint/bytes" in row]
    assert len(saves) == 2
    for row in saves:
        assert row["checkpoint/seconds"] >= row["checkpoint/blocked_seconds"] > 0
    assert saves[-1]["checkpoint/bytes"] == sum(file.size_bytes for file in read_contents(pairs[-1][1]).values())
