"""Write the tensors of a training run beside the training or in its way, and make them a checkpoint together.

    1. all ranks   the folder `<name>.writing`, a plan (Megatron-Core's), enough disk for it?
    2. each rank   its file, hashed while written; in a thread if training goes on meanwhile, from a copy of the tensors
    3. all ranks   did everybody succeed? then rank 0 writes index and manifest and renames the folder

Whatever fails on one rank ends the save on all, with the first cause, and leaves the earlier checkpoints alone.

A thread and not a forked process (Megatron-Core's own way): a process with CUDA and communication threads is not safe
to fork, an exception of a thread arrives whole, and a killed run leaves no writer behind that still fills the folder
the next run is cleaning.
"""

import errno
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.storage import WriteResult

from elastic.checkpoint.manifest import (
    Files,
    StoredFile,
    damages,
    step_folders,
    write_manifest,
    writing_folder,
)
from elastic.checkpoint.metadata import CheckpointError
from elastic.hf.disk import check_free_space
from elastic.world.file_records import explained, flush_to_disk, hashed_file
from elastic.world.groups import World


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a finished save is: where, its bytes, how long it took, and how long training waited for it."""

    folder: Path
    size_bytes: int
    seconds: float
    blocked_seconds: float


class CheckpointWrite:
    """One save under way. Every method but `wait` is called by all ranks together."""

    def __init__(
        self,
        folder: Path,
        sharded: dict[str, Any],
        world: World,
        add_files: Callable[[Path], None],
        *,
        in_background: bool,
    ) -> None:
        """Start; `add_files` puts the files beside the tensors into the folder it is given, on rank 0, now.

        Raises CheckpointError on all ranks when `folder` exists, cannot be written, or there is not enough disk.
        """
        self._since, self._needed_bytes, self._size_bytes = time.perf_counter(), 0, 0
        self.folder, self._writing, self._world = folder, writing_folder(folder), world
        self._agree(_failure(self._prepare) if world.is_main else None)
        self._plan = _Planner()
        dist_checkpointing.save(
            sharded,
            str(self._writing),
            sharded_strategy=self._plan,
            async_sharded_save=True,  # only plans: the writing is done here
            async_strategy="mcore",
        )
        needed = torch.tensor([self._plan.num_bytes()], dtype=torch.int64, device=world.device)
        torch.distributed.all_reduce(needed)
        self._needed_bytes = int(needed.item())
        self._agree(_failure(lambda: self._fill(add_files)) if world.is_main else None)
        self._results: list[WriteResult] = []
        self._files: dict[str, StoredFile] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if in_background:
            self._plan.copy_tensors()
            # A daemon: a run that fails in the meantime ends at once, and the folder is never renamed.
            self._thread = threading.Thread(target=self._write, name=f"save {folder.name}", daemon=True)
            self._thread.start()
        else:
            self._write()
        self._blocked = time.perf_counter() - self._since

    def is_written(self) -> bool:
        """Tell whether every rank has written its tensors, so that `finish` need not wait."""
        still = torch.tensor([float(self._thread is not None and self._thread.is_alive())], device=self._world.device)
        torch.distributed.all_reduce(still)
        return still.item() == 0

    def finish(self) -> SavedCheckpoint:
        """Wait for all ranks and make the folder a checkpoint; raises CheckpointError on all ranks if one failed."""
        since = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
        self._agree(self._error)
        gathered: list[Any] | None = [None] * torch.distributed.get_world_size() if self._world.is_main else None
        torch.distributed.gather_object((self._results, self._files), gathered, dst=0)
        self._agree(None if gathered is None else _failure(lambda: self._publish(gathered)))
        size = [self._size_bytes]
        torch.distributed.broadcast_object_list(size, src=0)
        now = time.perf_counter()
        return SavedCheckpoint(self.folder, size[0], now - self._since, self._blocked + now - since)

    def _prepare(self) -> None:
        if self.folder.exists():
            raise CheckpointError(f"{self.folder} exists already and is not replaced; remove it or choose another")
        for left in self.folder.parent.glob("step_*.writing"):  # by a run that was killed while saving
            shutil.rmtree(left)
        self._writing.mkdir(parents=True)

    def _fill(self, add_files: Callable[[Path], None]) -> None:
        check_free_space(self._writing, self._needed_bytes, "the checkpoint")
        add_files(self._writing)

    def _write(self) -> None:
        """Write this rank's file; what went wrong waits for `finish`."""
        self._error = _failure(self._write_tensors)

    def _write_tensors(self) -> None:
        for path, items in self._plan.files():
            with hashed_file(path) as stream:
                for item, data in items:
                    on_cpu = _compact(data) if isinstance(data, Tensor) else data
                    result = _write_item(
                        self._plan.writer.transforms, stream, on_cpu, item, path.name, SerializationFormat.TORCH_SAVE
                    )
                    if stream.failure is not None:
                        raise stream.failure
                    self._results.append(result)
            self._files[path.name] = StoredFile(path.stat().st_size, stream.sha256())

    def _publish(self, gathered: list[tuple[list[WriteResult], Files]]) -> None:
        assert self._plan.metadata is not None, "rank 0 has made the plan"
        self._plan.writer.finish(self._plan.metadata, [results for results, _ in gathered])
        save_config(CheckpointingConfig(self._plan.backend, self._plan.version), str(self._writing))
        files = write_manifest(self._writing, {name: file for _, files in gathered for name, file in files.items()})
        self._writing.rename(self.folder)
        flush_to_disk(self.folder.parent)
        self._size_bytes = sum(file.size_bytes for file in files.values())

    def _agree(self, error: Exception | None) -> None:
        """Raise CheckpointError on all ranks if one has an error; what was written so far is removed."""
        count = torch.tensor([float(error is not None)], device=self._world.device)
        torch.distributed.all_reduce(count)
        if count.item() == 0:
            return
        causes: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(causes, None if error is None else self._explained(error))
        message = [""]
        if self._world.is_main:
            rank, first = next((rank, cause) for rank, cause in enumerate(causes) if cause is not None)
            shutil.rmtree(self._writing, ignore_errors=True)
            where = f" (rank {rank})" if len(causes) > 1 else ""
            message = [f"{self.folder} was not saved{where}: {first}; {_what_remains(self.folder.parent)}"]
        torch.distributed.broadcast_object_list(message, src=0)
        if error is not None and not isinstance(error, OSError | ValueError):
            raise error  # our bug or torch's: with its traceback, where it happened
        raise CheckpointError(message[0]) from error

    def _explained(self, error: Exception) -> str:
        if not isinstance(error, OSError):
            return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        text = explained(error, self._writing)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += f" ({self._needed_bytes / 1e9:,.3f} GB needed in all)"
        return text


class _Writer(FileSystemWriterAsync):
    """Megatron-Core's writer, which only keeps what this rank has to write.

    Its own `prepare_write_data` also starts a server process per rank to carry results, seconds of imports, which a
    signal to the whole job would end; here results stay in the process.
    """

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Keep items and values: tensors on any device, or finished bytes."""
        self.file_name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron-Core's way of dealing tensors to ranks; keeps the plan instead of carrying it out."""

    writer: _Writer
    metadata: Metadata | None
    _files: list[tuple[Path, list[tuple[Any, Any]]]]

    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        """Plan, all ranks together; returns a request with nothing in it."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.writer = _Writer(checkpoint_dir)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        planned = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key, False), self.writer, planner=planner)
        _, self.metadata, _ = planned[0]
        path = Path(checkpoint_dir) / self.writer.file_name
        self._files = [(path, self.writer.items)] if self.writer.items else []
        return AsyncRequest(None, (), [])

    def files(self) -> list[tuple[Path, list[tuple[Any, Any]]]]:
        """Return the files of this rank, with the values of each: tensors on any device, or finished bytes."""
        return self._files

    def num_bytes(self) -> int:
        """Return the bytes of this rank's values."""
        data = (value for _, items in self._files for _, value in items)
        return sum(value.nbytes if isinstance(value, Tensor) else value.getbuffer().nbytes for value in data)

    def copy_tensors(self) -> None:
        """Take a copy of all tensors in the memory of the host, so that training may change them."""

        def copied(value: Any) -> Any:
            return value.to("cpu", copy=True, non_blocking=True) if isinstance(value, Tensor) else value

        self._files = [(path, [(item, copied(value)) for item, value in items]) for path, items in self._files]
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that owns just its values: torch.save writes all memory that a view looks into."""
    on_cpu = tensor.detach().cpu()
    return on_cpu if on_cpu.untyped_storage().nbytes() == on_cpu.nbytes else on_cpu.clone()


def _failure(action: Callable[[], object]) -> Exception | None:
    """Run `action`; return what it raised, so that all ranks can hear of it."""
    try:
        action()
    except Exception as error:
        return error
    return None


def _what_remains(parent: Path) -> str:
    whole = [folder.name for folder in step_folders(parent) if not damages(folder, full=False)]
    kept = f"{whole[-1]} is whole and stays" if whole else "there is no earlier checkpoint"
    return f"{kept}. When this is mended, the same command goes on from the newest whole checkpoint"
