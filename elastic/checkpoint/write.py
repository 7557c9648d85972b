"""The one writer of checkpoints: torch's own, with Megatron-Core's planner, over files that hash what they take.

A checkpoint is a list of files and a file is a plan: items, whose values are asked for when they are written. Here all
ranks of a training run plan and write together; stream.py writes the same files in one process, a layer at a time.

    1. all ranks   the folder `<name>.writing`, a plan, enough disk for it?
    2. each rank   its files, hashed while written; in a thread if training goes on meanwhile, from copies of tensors
    3. all ranks   did everybody succeed? then rank 0 writes index and contents and renames the folder

Whatever fails on one rank ends the save on all, with the first cause, and leaves the earlier checkpoints alone. A
thread and not a forked process (Megatron-Core's own way): a process with CUDA and communication threads is not safe to
fork, and a killed run leaves no writer behind that still fills the folder the next run is cleaning.
"""

import errno
import io
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata, SavePlan, WriteItem
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult

from elastic.checkpoint.contents import CheckpointError, StoredFile, what_remains, write_contents, writing_folder
from elastic.world.files import check_free_space, explained, flush_to_disk, hashed_file
from elastic.world.groups import World

FORMAT = CheckpointingConfig("torch_dist")  # what Megatron-Core calls torch's format
COMMON = ShardedObject("common_state", None, (1,), (0,))  # what it keeps beside tensors: values alike on all ranks
FILE_BYTES = 4 << 30  # of a rank go into one file: so much passes through the memory of the host at a time

Value = Tensor | io.BytesIO


class HashingFiles(FileSystem):
    """Torch's file system, with size and checksum of each file that was written in `stored`."""

    def __init__(self) -> None:
        self.stored: dict[str, StoredFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """Create a file; at the end it is on the disk. Raises the OSError of a failed write."""
        assert mode == "wb", "a writer reads nothing"
        with hashed_file(Path(path)) as hashed:
            yield hashed
        self.stored[Path(path).name] = StoredFile(Path(path).stat().st_size, hashed.sha256())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file that was written aside."""
        super().rename(path, new_path)
        self.stored[Path(new_path).name] = self.stored.pop(Path(path).name)


class Writer(FileSystemWriter):
    """Torch's writer over hashing files; `stored` says what lies on the disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)  # one value after the other
        self.fs = files = HashingFiles()
        self.stored = files.stored

    def write(self, plan: SavePlan, value_of: Callable[[WriteItem], Value]) -> list[WriteResult]:
        """Write the one file of `plan`."""
        return self.write_data(plan, _Values(value_of)).wait()


class _Values(DefaultSavePlanner):
    """Hands torch's writer each value at the moment it is written."""

    def __init__(self, value_of: Callable[[WriteItem], Value]) -> None:
        super().__init__()
        self._value_of = value_of

    def resolve_data(self, write_item: WriteItem) -> Value:
        return self._value_of(write_item)


def publish(
    folder: Path,
    writer: Writer,
    metadata: Metadata,
    results: Sequence[list[WriteResult]],
    add_files: Callable[[Path], object] = lambda folder: None,
    leave_out: Collection[str] = (),
) -> int:
    """Make what `writer` wrote the checkpoint `folder`: index, further files, contents, rename; returns its bytes.

    `leave_out` are files of the writing that go at last: until the rename, a failure costs nothing that is written.
    """
    writing = writing_folder(folder)
    writer.finish(metadata, list(results))
    save_config(FORMAT, str(writing))
    add_files(writing)
    files = write_contents(writing, writer.stored, leave_out)
    for name in leave_out:
        (writing / name).unlink()
    writing.rename(folder)
    flush_to_disk(folder.parent)
    return sum(file.size_bytes for file in files.values())


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a finished save is: where, its bytes, how long it took, and how long training waited for it."""

    folder: Path
    size_bytes: int
    seconds: float
    blocked_seconds: float


class CheckpointWrite:
    """One save under way. Every method is called by all ranks together."""

    def __init__(
        self,
        folder: Path,
        sharded: Callable[[], dict[str, Any]],
        world: World,
        add_files: Callable[[Path], None],
        *,
        in_background: bool,
    ) -> None:
        """Start: ask `sharded` for this rank's parts, which may take gathering; `add_files` puts the files beside them
        into the folder it is given, on rank 0, now.

        Raises CheckpointError on all ranks when `folder` exists, cannot be written, or there is not enough disk.
        """
        self._since, self._needed_bytes = time.perf_counter(), 0
        self.folder, self._world, self._writer = folder, world, Writer(writing_folder(folder))
        self._on_rank_0(self._prepare)
        planner = self._agreed(lambda: _planner(sharded(), world))
        local_plans = _gathered(planner.create_local_plan(), world)
        self._rank_plans: list[list[SavePlan]] | None = None  # of each rank, its files; on rank 0
        self._on_rank_0(lambda: self._plan(planner, local_plans, add_files))
        own: list[Any] = [None]
        torch.distributed.scatter_object_list(own, self._rank_plans, src=0)
        self._plans: list[SavePlan] = own[0]
        self._values = {item.index: planner.resolve_data(item) for plan in self._plans for item in plan.items}
        self._written: Future[list[WriteResult]] = Future()
        if in_background:
            self._copy_tensors()
            # A daemon: a run that fails in the meantime ends at once, and the folder is never renamed.
            Thread(target=self._write, name=f"save {folder.name}", daemon=True).start()
        else:
            self._write()
        self._blocked = time.perf_counter() - self._since

    def is_written(self) -> bool:
        """Tell whether every rank has written its tensors, so that `finish` need not wait."""
        still_writing = torch.tensor([float(not self._written.done())], device=self._world.device)
        torch.distributed.all_reduce(still_writing)
        return still_writing.item() == 0

    def finish(self) -> SavedCheckpoint:
        """Wait for all ranks and make the folder a checkpoint; raises CheckpointError on all ranks if one failed."""
        since = time.perf_counter()
        self._agree(self._written.exception())
        written, size = _gathered((self._written.result(), self._writer.stored), self._world), [0]

        def make() -> None:
            for _, stored in written:
                self._writer.stored.update(stored)
            size[0] = publish(self.folder, self._writer, self._metadata, [results for results, _ in written])

        self._on_rank_0(make)
        torch.distributed.broadcast_object_list(size, src=0)
        now = time.perf_counter()
        return SavedCheckpoint(self.folder, size[0], now - self._since, self._blocked + now - since)

    def _prepare(self) -> None:
        if self.folder.exists():
            raise CheckpointError(f"{self.folder} exists already and is not replaced; remove it or choose another")
        for left in self.folder.parent.glob("step_*.writing"):  # by a run that was killed while saving
            shutil.rmtree(left)
        writing_folder(self.folder).mkdir(parents=True)

    def _plan(self, planner: MCoreSavePlanner, local: list[SavePlan], add_files: Callable[[Path], None]) -> None:
        """Deal the values of all ranks to numbered files, if there is disk for them."""
        plans, self._metadata = planner.create_global_plan(local)
        self._needed_bytes = sum(num_bytes(item) for plan in plans for item in plan.items)
        check_free_space(writing_folder(self.folder), self._needed_bytes, "the checkpoint")
        add_files(writing_folder(self.folder))
        files = [_files(plan) for plan in plans]
        numbered = iter(self._writer.prepare_global_plan([plan for own in files for plan in own]))
        self._rank_plans = [[next(numbered) for _ in own] for own in files]

    def _copy_tensors(self) -> None:
        """Take a copy of all tensors in the memory of the host, so that training may change them.

        Not pinned: torch would keep such memory for good. What lies on a GPU's host was gathered for this save alone.
        """
        for index, value in self._values.items():
            if isinstance(value, Tensor) and value.device.type == self._world.device.type:
                self._values[index] = torch.empty_like(value, device="cpu").copy_(value)

    def _write(self) -> None:
        """Write this rank's files; what went wrong waits for `finish`."""
        try:
            results = [self._writer.write(plan, lambda item: self._values[item.index]) for plan in self._plans]
            self._written.set_result([result for of_file in results for result in of_file])
        except Exception as error:
            self._written.set_exception(error)

    def _on_rank_0(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0; what it raises ends the save on all ranks."""
        self._agreed(lambda: action() if self._world.is_main else None)

    def _agreed[T](self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; what it raises on one, unless others wait for it there, ends the save on all."""
        found, failure = list[T](), None
        try:
            found.append(action())
        except Exception as error:
            failure = error
        self._agree(failure)
        return found[0]

    def _agree(self, error: BaseException | None) -> None:
        """Raise CheckpointError on all ranks if one has an error; what was written so far is removed."""
        causes: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(causes, None if error is None else self._explained(error))
        rank, first = next(((rank, cause) for rank, cause in enumerate(causes) if cause is not None), (0, None))
        if first is None:
            return
        message = [""]
        if self._world.is_main:
            shutil.rmtree(writing_folder(self.folder), ignore_errors=True)
            where = f" (rank {rank})" if len(causes) > 1 else ""
            message = [f"{self.folder} was not saved{where}: {first}; {what_remains(self.folder.parent)}"]
        torch.distributed.broadcast_object_list(message, src=0)
        if error is not None and not isinstance(error, OSError | ValueError):
            raise error  # our bug or torch's: with its traceback, where it happened
        raise CheckpointError(message[0]) from error

    def _explained(self, error: BaseException) -> str:
        if not isinstance(error, OSError):
            return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        text = explained(error, writing_folder(self.folder))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += f" ({self._needed_bytes / 1e9:,.3f} GB needed in all)"
        return text


def _planner(sharded: dict[str, Any], world: World) -> MCoreSavePlanner:
    """Take the state of this rank apart as Megatron-Core does, all ranks together; each value has one rank."""
    parts, common = save_preprocess(sharded)
    parts[COMMON.key] = ShardedObject(
        COMMON.key, common, COMMON.global_shape, COMMON.global_offset, replica_id=torch.distributed.get_rank()
    )
    by_key = defaultdict(list)
    for part in filter(lambda part: is_main_replica(part.replica_id), nested_values(parts)):
        by_key[part.unique_key if isinstance(part, ShardedObject) else part.key].append(part)
    planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=world.is_main)
    return planner


def _files(plan: SavePlan) -> list[SavePlan]:
    """Split the items of a rank into files."""
    files: list[list[WriteItem]] = []
    size = FILE_BYTES
    for item in plan.items:
        if size + num_bytes(item) > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(item)
        size += num_bytes(item)
    return [SavePlan(items) for items in files]


def num_bytes(item: WriteItem) -> int:
    """Return the bytes of one value."""
    if item.tensor_data is None:
        return 0  # the common state, some kilobytes
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _gathered(value: object, world: World) -> list[Any]:
    """Return the values of all ranks, on rank 0."""
    box: list[Any] | None = [None] * torch.distributed.get_world_size() if world.is_main else None
    torch.distributed.gather_object(value, box, dst=0)
    return box or []
