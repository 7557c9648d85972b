"""Write a checkpoint in one process, file by file, so that memory holds one layer and a kill loses one layer's work.

The writer, the files and the last steps are those of write.py; not shared is only who plans (here the table of keys:
there is no model) and what a kill may leave (a training run writes its next step anew, an import goes on).

    step_00000000.writing/
        written.jsonl        a line per finished file: its checksum, and where each key lies in it; gone at the end
        __0_0.distcp         what Megatron-Core keeps beside tensors
        __1_0.distcp, ...    embedding, layer 0, layer 1, ..., head
        .metadata, metadata.json, manifest.json
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, WriteItem
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from elastic.checkpoint.contents import CheckpointError, StoredFile, writing_folder
from elastic.checkpoint.read import StoredPart, stored_parts
from elastic.checkpoint.record import Record
from elastic.checkpoint.write import COMMON, Writer, publish
from elastic.rank.slicing import TensorSource, reader
from elastic.space.layers import parameter_names, split_parameter_name
from elastic.space.shape import ModelShape
from elastic.world.files import explained

JOURNAL = "written.jsonl"


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

    def write_item(self) -> WriteItem:
        """Return what torch's writer is asked for: all of the global tensor."""
        size = torch.Size(self.part.size)
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), size)
        return WriteItem(MetadataIndex(self.part.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


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

    def add_all(folder: Path) -> None:
        add_files(folder)
        record.write(folder)

    try:
        writer = Writer(writing)
        metadata, results = _write_parameters(writer, writing, record.shape, dtypes, source, identity, progress)
        publish(folder, writer, metadata, results, add_all, leave_out=(JOURNAL,))
    except OSError as error:
        raise CheckpointError(
            f"{folder} was not written: {explained(error, writing)}. What is finished stays in {writing.name}"
        ) from error


def _write_parameters(
    writer: Writer,
    folder: Path,
    shape: ModelShape,
    dtypes: Mapping[str, torch.dtype],
    source: TensorSource,
    identity: str,
    progress: Callable[[int], None],
) -> tuple[Metadata, list[list[WriteResult]]]:
    """Write what an earlier run did not finish; returns the index, and where everything lies."""
    finished, files = _finished_files(folder, identity), _files(shape, dtypes)
    common = WriteItem(MetadataIndex(COMMON.unique_key), WriteItemType.BYTE_IO)
    items = [[common], *([key.write_item() for key in keys] for keys in files)]
    plans, metadata = create_default_global_save_plan([SavePlan(of_file) for of_file in items])
    first, *plans = writer.prepare_global_plan(plans)
    results = [writer.write(first, lambda _item: _common_state())]  # at every start: it takes no time
    like = results[0][0].storage_data
    for keys, plan, line in zip(files, plans, [*finished, *[None] * (len(files) - len(finished))], strict=True):
        if line is None:
            written = writer.write(plan, _ReadWhenWritten(reader(source), keys))
            _note_finished(folder, written, writer.stored)
        else:
            written = _noted(folder, line, plan, like, writer.stored)
        results.append(written)
        progress(sum(key.num_bytes for key in keys))
    return metadata, results


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


def _common_state() -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([{}], stream)
    return stream


class _ReadWhenWritten:
    """Gives the values of keys in their order; the parts of one parameter are read once, and one is held at a time."""

    def __init__(self, read: Callable[[str], Tensor], keys: Iterable[_StoredKey]) -> None:
        self._read, self._keys = read, {key.part.key: key for key in keys}
        self._current: tuple[str, Tensor] | None = None

    def __call__(self, item: WriteItem) -> Tensor:
        key = self._keys[item.index.fqn]
        if self._current is None or self._current[0] != key.parameter:
            self._current = None  # forget one tensor before the next is read
            self._current = (key.parameter, self._read(key.parameter).detach().to("cpu", key.dtype))
        return self._current[1].narrow(0, key.part.start, key.part.size[0]).contiguous()


def _note_finished(folder: Path, results: list[WriteResult], stored: Mapping[str, StoredFile]) -> None:
    extents = [(result.index, result.storage_data) for result in results]
    entries = [[index.fqn, index.offset, extent.offset, extent.length] for index, extent in extents]
    file_name = extents[0][1].relative_path
    with (folder / JOURNAL).open("a") as journal:
        line = {"file": file_name, "sha256": stored[file_name].sha256, "entries": entries}
        journal.write(json.dumps(line) + "\n")
        journal.flush()
        os.fsync(journal.fileno())


def _finished_files(folder: Path, identity: str) -> list[dict[str, Any]]:
    """Return what an earlier, killed run noted of its finished files; starts the journal where there is none."""
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
    journal.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines[1:]]


def _noted(
    folder: Path, line: dict[str, Any], plan: SavePlan, like: Any, stored: dict[str, StoredFile]
) -> list[WriteResult]:
    """Return where the keys of a finished file lie, as torch's writer said it; `like` is an extent as it gives them."""
    path, size = folder / line["file"], sum(length for *_, length in line["entries"])
    keys = [key for key, *_ in line["entries"]]
    if keys != [item.index.fqn for item in plan.items] or not path.is_file() or path.stat().st_size != size:
        raise UnfinishedError(f"{path} is not as an interrupted run left it; remove {folder} and start again")
    stored[path.name] = StoredFile(size, line["sha256"])
    return [
        WriteResult(
            MetadataIndex(key, offsets), length, replace(like, relative_path=path.name, offset=start, length=length)
        )
        for key, offsets, start, length in line["entries"]
    ]
