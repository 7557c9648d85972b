"""Write a Megatron-Core checkpoint file by file, so that memory holds one layer and a kill loses one layer's work.

The result is what `dist_checkpointing.save` writes, with one file for the embedding, each layer, and the head. Torch's
own writer makes the files; only the moment at which a tensor is read is ours.

    step_00000000.writing/
        written.jsonl        a line per finished file: its checksum, and where each key lies in it; gone at the end
        __0_0.distcp, ...    embedding, layer 0, layer 1, ..., head
        .metadata, metadata.json, manifest.json
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    DefaultSavePlanner,
    FileSystemWriter,
    Metadata,
    SavePlan,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from elastic.checkpoint.manifest import StoredFile, write_manifest, writing_folder
from elastic.checkpoint.metadata import CheckpointError
from elastic.checkpoint.record import Record
from elastic.checkpoint.stored_names import StoredPart, stored_parts
from elastic.rank.slicing import TensorSource, parameter_names, reader
from elastic.space.nesting import split_parameter_name
from elastic.space.shape import ModelShape
from elastic.world.file_records import explained, flush_to_disk, hashed_file

JOURNAL = "written.jsonl"
# What Megatron-Core asks for beside tensors: values that are alike on all ranks, here none.
COMMON_KEY = "common_state/shard_0_1"


class UnfinishedError(ValueError):
    """An unfinished checkpoint that this run may not go on with."""


@dataclass(frozen=True)
class _StoredKey:
    """One key of the checkpoint: a part of a parameter, and the number format it is stored in."""

    parameter: str
    part: StoredPart
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.part.size).numel() * self.dtype.itemsize

    def chunk(self) -> ChunkStorageMetadata:
        """Return where the stored tensor lies in the global one: it is all of it."""
        return ChunkStorageMetadata(torch.Size([0] * len(self.part.size)), torch.Size(self.part.size))

    def write_item(self) -> WriteItem:
        properties, size = TensorProperties(dtype=self.dtype), torch.Size(self.part.size)
        index = MetadataIndex(self.part.key, self.chunk().offsets)
        return WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(self.chunk(), properties, size))

    def index_entry(self) -> TensorStorageMetadata:
        return TensorStorageMetadata(TensorProperties(dtype=self.dtype), torch.Size(self.part.size), [self.chunk()])


def save_streamed(
    folder: Path,
    record: Record,
    dtypes: Mapping[str, torch.dtype],
    source: TensorSource,
    *,
    identity: str,
    add_files: Callable[[Path], object] = lambda folder: None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a checkpoint of `record.shape`, each parameter read from `source` when its turn comes.

    `dtypes` says by name how each is stored. `identity` says in words where the tensors come from: what a killed run
    left under the same identity is gone on with. `add_files` puts further files beside the record. `progress` is told
    the bytes of each file when it is on disk. Written aside and renamed when whole; raises CheckpointError for a folder
    that exists, UnfinishedError for an unfinished one of another run, or one that changed since.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already and is not replaced; remove it or choose another folder")
    writing = writing_folder(folder)
    try:
        files = _write_parameters(writing, record.shape, dtypes, source, identity, progress)
        add_files(writing)
        record.write(writing)
        write_manifest(writing, files, leave_out=(JOURNAL,))
        (writing / JOURNAL).unlink()  # the last step but the rename: until then a failure costs no finished file
        writing.rename(folder)
        flush_to_disk(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder} was not written: {explained(error, writing)}. What is finished stays in {writing.name}"
        ) from error


def _write_parameters(
    folder: Path,
    shape: ModelShape,
    dtypes: Mapping[str, torch.dtype],
    source: TensorSource,
    identity: str,
    progress: Callable[[int], None],
) -> dict[str, StoredFile]:
    """Write what an earlier run did not finish; returns size and checksum of each file, as written."""
    files = _files(shape, dtypes)
    written, stored = _finished_files(folder, identity)
    writer = _HashingWriter(folder)
    plans = writer.prepare_global_plan([SavePlan(_write_items(number, keys)) for number, keys in enumerate(files)])
    for number, (keys, plan) in enumerate(zip(files, plans, strict=True)):
        if number == len(written):
            written.append(writer.write_data(plan, _ReadWhenWritten(reader(source), keys)).wait())
            stored |= writer.take_stored()
            _note_finished(folder, written[-1], stored)
        progress(sum(key.num_bytes for key in keys))
    index: dict[str, Any] = {key.part.key: key.index_entry() for keys in files for key in keys}
    writer.finish(Metadata({COMMON_KEY: BytesStorageMetadata(), **index}), written)
    strategy = TorchDistSaveShardedStrategy()
    save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))
    return stored


def stored_bytes(shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> int:
    """Return the bytes of all values that `save_streamed` writes."""
    return sum(key.num_bytes for keys in _files(shape, dtypes) for key in keys)


def _files(shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> list[list[_StoredKey]]:
    """Deal the keys of all parameters, in model order, to files: embedding, a file per layer, final norm and head."""
    files: list[list[_StoredKey]] = []
    last: int | None = -1
    for name in parameter_names(shape):
        layer_index, _ = split_parameter_name(name)
        if layer_index != last:
            files.append([])
            last = layer_index
        files[-1] += [_StoredKey(name, part, dtypes[name]) for part in stored_parts(name, shape)]
    return files


def _write_items(number: int, keys: Sequence[_StoredKey]) -> list[WriteItem]:
    items = [key.write_item() for key in keys]
    if number == 0:
        common = WriteItem(MetadataIndex(COMMON_KEY), WriteItemType.BYTE_IO, BytesIOWriteData(_common_state().tell()))
        items.insert(0, common)
    return items


def _common_state() -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([{}], stream)
    return stream


class _HashingFiles(FileSystem):
    """Torch's file system, with the size and checksum of each file written."""

    def __init__(self) -> None:
        self.stored: dict[str, StoredFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file; one that is written is on the disk at the end. Raises the OSError of a failed write."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with hashed_file(Path(path)) as hashed:
            yield hashed
        self.stored[Path(path).name] = StoredFile(Path(path).stat().st_size, hashed.sha256())


class _HashingWriter(FileSystemWriter):
    """Torch's writer over `_HashingFiles`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)
        self._hashing = _HashingFiles()
        self.fs = self._hashing

    def take_stored(self) -> dict[str, StoredFile]:
        """Return size and checksum of the files written since the last call."""
        stored, self._hashing.stored = self._hashing.stored, {}
        return stored


class _ReadWhenWritten(DefaultSavePlanner):
    """Hands torch's writer each tensor at the moment it is written; the parts of one parameter are read once."""

    def __init__(self, read: Callable[[str], Tensor], keys: Iterable[_StoredKey]) -> None:
        super().__init__()
        self._read, self._keys = read, {key.part.key: key for key in keys}
        self._current: tuple[str, Tensor] | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the values of one key."""
        if write_item.type is WriteItemType.BYTE_IO:
            return _common_state()
        key = self._keys[write_item.index.fqn]
        if self._current is None or self._current[0] != key.parameter:
            self._current = None  # forget one tensor before the next is read
            self._current = (key.parameter, self._read(key.parameter).detach().to("cpu", key.dtype))
        return self._current[1].narrow(0, key.part.start, key.part.size[0]).contiguous()


def _note_finished(folder: Path, results: Sequence[WriteResult], stored: Mapping[str, StoredFile]) -> None:
    entries = [
        [result.index.fqn, result.index.offset, result.storage_data.offset, result.storage_data.length]
        for result in results
    ]
    file_name = results[0].storage_data.relative_path
    with (folder / JOURNAL).open("a") as journal:
        line = {"file": file_name, "sha256": stored[file_name].sha256, "entries": entries}
        journal.write(json.dumps(line) + "\n")
        journal.flush()
        os.fsync(journal.fileno())


def _finished_files(folder: Path, identity: str) -> tuple[list[list[WriteResult]], dict[str, StoredFile]]:
    """Return what an earlier, killed run finished, in order, and its files; starts the journal where there is none."""
    journal, heading = folder / JOURNAL, json.dumps({"identity": identity})
    lines = journal.read_text().split("\n")[:-1] if journal.is_file() else []  # a torn last line has no end
    if not lines:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        lines = [heading]
    if lines[0] != heading:
        raise UnfinishedError(
            f"{folder} was left unfinished by another run: {json.loads(lines[0])['identity']}; remove it (or set "
            f"exp_manager.overwrite=true), or choose another exp_manager.version"
        )
    finished, stored = [], {}
    for line in map(json.loads, lines[1:]):
        path = folder / line["file"]
        if not path.is_file() or path.stat().st_size != sum(length for *_, length in line["entries"]):
            raise UnfinishedError(f"{path} is not as an interrupted run left it; remove {folder} and start again")
        finished.append([_result(line["file"], *entry) for entry in line["entries"]])
        stored[line["file"]] = StoredFile(path.stat().st_size, line["sha256"])
    journal.write_text("".join(f"{line}\n" for line in lines))
    return finished, stored


def _result(file_name: str, key: str, offsets: list[int] | None, start: int, length: int) -> WriteResult:
    return WriteResult(MetadataIndex(key, offsets), length, _StorageInfo(file_name, start, length))
