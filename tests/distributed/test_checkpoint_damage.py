"""A damaged checkpoint of a real run of two ranks is noticed, named and passed over, whatever was damaged."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic.train.checkpoint_find import checkpoint_folder, list_checkpoints, newest_whole, resolve_checkpoint
from elastic.train.checkpoint_manifest import MANIFEST_FILE, damages
from elastic.train.checkpoint_metadata import METADATA_FILE, CheckpointError
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


def test_every_damage_is_detected_and_the_previous_checkpoint_used(pair: Path) -> None:
    run = pair / "run" / "damaged"
    older, newest = list_checkpoints(run)
    files = {path.name for path in newest.iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", METADATA_FILE, "router.safetensors", "record.json", "state.json"} < files
    cases = list(changes(newest))
    assert len(cases) >= 100
    for name, what, change in cases:
        path = newest / name
        good = path.read_bytes()
        damaged = change(good)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        heard: list[str] = []
        assert newest_whole(run, full=True, say=heard.append) == older, f"{name} {what}"
        assert heard and f"{newest.name} is not whole: {name}" in heard[0], f"{name} {what}: {heard}"
        path.write_bytes(good)
    assert newest_whole(run, full=True, say=pytest.fail) == newest


def test_swapped_and_foreign_files_are_detected(pair: Path) -> None:
    run = pair / "run" / "damaged"
    older, newest = list_checkpoints(run)
    kept = {name: (newest / name).read_bytes() for name in ("__0_0.distcp", "__1_0.distcp", METADATA_FILE)}
    (newest / "__0_0.distcp").write_bytes(kept["__1_0.distcp"])
    (newest / "__1_0.distcp").write_bytes(kept["__0_0.distcp"])
    assert resolve_checkpoint(run, full=True) == older
    for name, good in kept.items():
        (newest / name).write_bytes((older / name).read_bytes())  # of an earlier step: the same size
        assert resolve_checkpoint(run, full=True) == older, name
        (newest / name).write_bytes(good)
    assert resolve_checkpoint(run, full=True) == newest


def verify_together(folder: Path) -> list[str]:
    """Verify with all ranks sharing the work; returns what this rank was told."""
    import torch

    from elastic.modules.model import Layout
    from elastic.train.parallel import join_world

    return damages(folder, full=True, world=join_world(Layout(), torch.device("cpu")))


def test_ranks_share_the_checking_and_are_told_the_same(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = list_checkpoints(pair / "run" / "damaged")[-1]
    large = sorted(newest.glob("*.distcp"))
    goods = [path.read_bytes() for path in large]
    assert run_distributed(verify_together, 2, newest) == [[], []]
    for path, good in zip(large, goods, strict=True):
        path.write_bytes(flipped(len(good) // 2)(good))
    first, second = run_distributed(verify_together, 2, newest)
    assert first == second and [problem.split()[0] for problem in sorted(first)] == [path.name for path in large]
    for path, good in zip(large, goods, strict=True):
        path.write_bytes(good)


def test_a_resumed_run_goes_on_from_the_previous_one_and_ends_the_same(pair: Path) -> None:
    """A flipped byte in the newest checkpoint costs the steps after the one before it, and nothing else."""
    for version in ("whole", "flipped"):
        shutil.copytree(pair / "run" / "damaged", pair / "run" / version)
    newest = checkpoint_folder(pair / "run" / "flipped", 6)
    path = newest / "__1_0.distcp"
    path.write_bytes(flipped(path.stat().st_size // 2)(path.read_bytes()))
    for version in ("whole", "flipped"):
        run_distributed(train, 2, elastic_values(pair, version, parallel=TWO))
    resumed, expected = rows(pair, "flipped"), rows(pair, "whole")
    assert resumed == expected and 9 in expected
    logged = (pair / "run" / "flipped" / "metrics.jsonl").read_text()
    assert logged.count('{"step": 4, "phase"') == 2, "it went on from step 3"
    assert (newest.parent / "step_00000006.broken" / MANIFEST_FILE).is_file(), "for a look at what happened"
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
    from elastic.train.family import open_family

    shutil.copytree(pair / "run" / "damaged", pair / "run" / "read")
    older, newest = list_checkpoints(pair / "run" / "read")
    (newest / "router.safetensors").write_bytes(b"")
    heard: list[str] = []
    family = open_family(str(pair / "run" / "read"), None, None, (), say=heard.append)
    assert family.checkpoint == older and "router.safetensors has 0 bytes" in heard[0]
    with pytest.raises(CheckpointError, match=f"router.safetensors has 0 bytes.*the nearest whole one is {older}"):
        open_family(str(newest), None, None, ())
