"""Saves: in the background like in the foreground; and what fails on one rank, on all disks, ends clearly."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

from elastic.checkpoint import write as checkpoint_write
from elastic.checkpoint.contents import CheckpointError, damages, read_contents, write_contents, writing_folder
from elastic.checkpoint.find import checkpoint_folder, list_checkpoints
from elastic.checkpoint.read import StoredTensors
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import Trainable, begin_save, load_checkpoint
from elastic.checkpoint.write import CheckpointWrite
from elastic.model.model import build_model
from elastic.world.groups import Layout, World, join_world
from recipes import _common
from tests.distributed.elastic_step import tiny_space
from tests.distributed.harness import fork_server, run_distributed
from tests.distributed.training import elastic_values, train

LAYOUT = Layout(tensor=2)


class Pair:
    """Two ranks with a tiny model that save into `run`."""

    def __init__(self, run: Path) -> None:
        self.run, self.space = run, tiny_space()
        self.here: World = join_world(LAYOUT, torch.device("cpu"))
        self.trained = Trainable(build_model(self.space, LAYOUT, seed=1))
        self.record = Record("parent", self.space.parent)

    def save(self, step: int, in_background: bool = False) -> None:
        begin_save(
            checkpoint_folder(self.run, step),
            self.trained,
            self.record,
            None,
            self.here,
            in_background=in_background,
        ).finish()

    def failed(self, step: int, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            self.save(step, **options)
        assert not checkpoint_folder(self.run, step).exists()
        assert not writing_folder(checkpoint_folder(self.run, step)).exists(), "no half of it stays"
        return str(caught.value)


def limit_file_size(num_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


def failing_rank(run: Path) -> list[str]:
    """Save; then the second rank may not write a large file, in the foreground and in the background; then save."""
    pair = Pair(run)
    pair.save(1)
    messages = []
    for step, in_background in ((2, False), (3, True)):
        if not pair.here.is_main:
            limit_file_size(10_000)
        messages.append(pair.failed(step, in_background=in_background))
        if not pair.here.is_main:
            limit_file_size(resource.RLIM_INFINITY)
    pair.save(4)
    load_checkpoint(checkpoint_folder(run, 4), pair.trained)
    messages.append(pair_exists(pair))
    return messages


def pair_exists(pair: Pair) -> str:
    with pytest.raises(CheckpointError) as caught:
        pair.save(4)
    return str(caught.value)


def test_one_ranks_failure_is_everybodys_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    first, second = run_distributed(failing_rank, 2, tmp_path)
    assert first == second
    for message in first[:2]:
        assert "was not saved (rank 1): " in message and "__1_0.distcp: File too large" in message
        assert "allow larger files" in message and "step_00000001 is whole and stays" in message
    assert "step_00000004 exists already and is not replaced" in first[2]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000004"]
    assert not any(damages(folder, full=True) for folder in list_checkpoints(tmp_path))


def full_disk(run: Path) -> dict[str, str]:
    """Save onto a disk until it is full: noticed before anything is written, while writing, and where it is denied."""
    pair, messages = Pair(run), {}
    pair.save(1)
    filler = run / "filler"

    def fill(leave: int) -> None:
        if pair.here.is_main:
            filler.write_bytes(bytes(max(0, shutil.disk_usage(run).free - leave)))
        torch.distributed.barrier()

    def empty() -> None:
        torch.distributed.barrier()
        if pair.here.is_main:
            filler.unlink()
        torch.distributed.barrier()

    fill(leave=10_000)
    messages["before"] = pair.failed(2)
    empty()
    for name, in_background in (("while", False), ("behind", True)):
        write = CheckpointWrite(
            checkpoint_folder(run, 3),
            lambda: {"model": pair.trained.model.sharded_state_dict(metadata={})},
            pair.here,
            # Somebody else fills the disk after it was looked at.
            lambda writing: filler.write_bytes(bytes(shutil.disk_usage(run).free - 20_000)),
            in_background=in_background,
        )
        with pytest.raises(CheckpointError) as caught:
            write.finish()
        messages[name] = str(caught.value)
        empty()
    if pair.here.is_main:
        subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
    torch.distributed.barrier()
    messages["denied"] = pair.failed(4)
    if pair.here.is_main:
        subprocess.run(["mount", "-o", "remount,rw", str(run)], check=True)
    torch.distributed.barrier()
    pair.save(5)
    load_checkpoint(checkpoint_folder(run, 5), pair.trained)
    return messages


def test_a_full_or_read_only_disk_keeps_the_old_checkpoint_and_says_what_to_do(small_disk: Path) -> None:
    first, second = run_distributed(full_disk, 2, small_disk)
    assert first == second
    assert "not enough disk for the checkpoint" in first["before"] and "GB needed" in first["before"]
    for name in ("while", "behind"):
        assert "No space left on device" in first[name] and "GB needed in all" in first[name], first[name]
        assert "GB free there now; free space there" in first[name]
    assert "Read-only file system; mount the disk writable" in first["denied"]
    assert all("step_00000001 is whole and stays" in message for message in first.values())
    assert [path.name for path in list_checkpoints(small_disk)] == ["step_00000001", "step_00000005"]
    assert not any(damages(folder, full=True) for folder in list_checkpoints(small_disk))


def train_as_a_recipe(values: dict[str, Any], errors: Path) -> None:
    """Be the process of a recipe, whose exit code it is; what it says on standard error goes to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv[1:] = []
    _common.run(lambda: train(values))


def test_a_run_that_fills_its_disk_leaves_with_an_error_and_resumes(start: Path, small_disk: Path) -> None:
    """Checkpoints at 3, 6 and 9; the disk is full when 6 is due."""
    errors = small_disk.parent / "errors.txt"
    values = elastic_values(start, "v", exp_manager=dict(exp_dir=str(small_disk), create_tensorboard_logger=False))
    run = small_disk / "run" / "v"
    one = sum(file.size_bytes for file in read_contents(list_checkpoints(start / "run" / "permuted")[0]).values())
    resize(small_disk, 5 * one)  # weights and twice as much again for Adam, but not two of it

    with fork_server() as context:
        process = context.Process(target=train_as_a_recipe, args=(values, errors))
        process.start()
    process.join(timeout=240)
    process.kill()  # if it still runs
    said = errors.read_text()
    assert process.exitcode == 2, said
    assert "step_00000006 was not saved: not enough disk for the checkpoint" in said
    assert "step_00000003 is whole and stays" in said and "Traceback" not in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    resize(small_disk, 20 * one)
    run_distributed(train, 1, values)
    assert [path.name for path in list_checkpoints(run)] == ["step_00000006", "step_00000009"]


def resize(disk: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def foreign_and_split(run: Path) -> list[set[str]]:
    """Save with Megatron-Core's own writer, as checkpoints of earlier versions were, and with small files."""
    pair = Pair(run)
    weights = {name: value.clone() for name, value in pair.trained.model.state_dict().items() if value is not None}

    def loads_back(folder: Path) -> None:
        with torch.no_grad():
            for parameter in pair.trained.model.parameters():
                parameter.zero_()
        load_checkpoint(folder, pair.trained)
        found = pair.trained.model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items())

    earlier = checkpoint_folder(run, 1)
    if pair.here.is_main:
        earlier.mkdir(parents=True)
    torch.distributed.barrier()
    get_write_results_queue("fork")  # the writer's own would be in a new interpreter, with all its imports
    dist_checkpointing.save({"model": pair.trained.model.sharded_state_dict(metadata={})}, str(earlier))
    if pair.here.is_main:
        pair.record.write(earlier)
        write_contents(earlier, {})
    torch.distributed.barrier()
    loads_back(earlier)
    with mock.patch.object(checkpoint_write, "FILE_BYTES", 20_000):
        pair.save(2)
        pair.save(3, in_background=True)
    for step in (2, 3):
        loads_back(checkpoint_folder(run, step))
    return [{path.name for path in folder.glob("*.distcp")} for folder in list_checkpoints(run)]


def test_earlier_checkpoints_and_those_of_many_files_are_read(tmp_path: Path) -> None:
    """A rank writes several files where one would be large; the index says where everything lies."""
    (earlier, split, background), _ = run_distributed(foreign_and_split, 2, tmp_path)
    assert earlier == {"__0_0.distcp", "__1_0.distcp"}
    assert len(split) > 4 and split == background
    first, *others = (StoredTensors(folder, tiny_space().parent) for folder in list_checkpoints(tmp_path))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    contents = [read_contents(folder) for folder in list_checkpoints(tmp_path)[1:]]
    assert all(contents[0][name] == contents[1][name] for name in split)
