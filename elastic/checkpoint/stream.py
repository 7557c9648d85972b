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
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, WriteItem
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from elastic.checkpoint.contents import CheckpointError, StoredFile, writing_folder
from elastic.checkpoint.read import StoredPart, stored_parts
from elastic.checkpoint.record import Record
from elastic.checkpoint.write import COMMON, Writer, num_bytes, publish
from elastic.rank.slicing import TensorSource, reader
from elastic.space.layers import parameter_names, split_parameter_name
from elastic.space.shape import ModelShape
from elastic.world.files import explained

JOURNAL = "written.jsonl"


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
    that exists, an unfinished one of another run, or one that changed since.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already and is not replaced; remove it or choose another folder")
    writing = writing_folder(folder)

    def add_all(folder: Path) -> None:
        add_files(folder)
        record.write(folder)

    try:
        writer = Writer(writing)
        common = SavePlan([WriteItem(MetadataIndex(COMMON.unique_key), WriteItemType.BYTE_IO)])
        plans, metadata = create_default_global_save_plan([common, *_plans(record.shape, dtypes)])
        first, *plans = writer.prepare_global_plan(plans)
        finished, read = _finished_files(writing, identity), _ReadWhenWritten(reader(source), record.shape)
        results = [writer.write(first, lambda _item: _common_state())]  # at every start: it takes no time
        like = results[0][0].storage_data
        for plan, line in zip_longest(plans, finished):
            if line is None:
                results.append(writer.write(plan, read))
                _note_finished(writing, results[-1], writer.stored)
            else:
                results.append(_noted(writing, line, plan, like, writer.stored))
            progress(sum(map(num_bytes, plan.items)))
        publish(folder, writer, metadata, results, add_all, leave_out=(JOURNAL,))
    except OSError as error:
        raise CheckpointError(
            f"{folder} was not written: {explained(error, writing)}. What is finished stays in {writing.name}"
        ) from error


def stored_bytes(shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> int:
    """Return the bytes of all values that `save_streamed` writes."""
    return sum(num_bytes(item) for plan in _plans(shape, dtypes) for item in plan.items)


def _plans(shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> list[SavePlan]:
    """Deal the keys of all parameters, in model order, to files: embedding, a file per layer, final norm and head."""
    return [
        SavePlan([_whole(part, dtypes[name]) for name in names for part in stored_parts(name, shape)])
        for _, names in groupby(parameter_names(shape), lambda name: split_parameter_name(name)[0])
    ]


def _whole(part: StoredPart, dtype: torch.dtype) -> WriteItem:
    """Return what torch's writer is asked for: all of the global tensor."""
    size = torch.Size(part.size)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), size)
    return WriteItem(MetadataIndex(part.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _common_state() -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([{}], stream)
    return stream


class _ReadWhenWritten:
    """Gives the values of keys in their order; the parts of one parameter are read once, and one is held at a time."""

    def __init__(self, read: Callable[[str], Tensor], shape: ModelShape) -> None:
        self._read, names = read, parameter_names(shape)
        self._parts = {part.key: part for name in names for part in stored_parts(name, shape)}
        self._current: tuple[str, Tensor] | None = None

    def __call__(self, item: WriteItem) -> Tensor:
        part, data = self._parts[item.index.fqn], item.tensor_data
        assert data is not None
        if self._current is None or self._current[0] != part.parameter:
            self._current = None  # forget one tensor before the next is read
            self._current = (part.parameter, self._read(part.parameter).detach().to("cpu", data.properties.dtype))
        return self._current[1].narrow(0, part.start, part.size[0]).contiguous()


def _note_finished(folder: Path, results: list[WriteResult], stored: Mapping[str, StoredFile]) -> None:
    extents = [(result.index, result.storage_data) for result in results]
    entries = [[index.fqn, index.offset, extent.offset, extent.length] for index, extent in extents]
    name = extents[0][1].relative_path
    with (folder / JOURNAL).open("a") as journal:
        journal.write(json.dumps({"file": name, "sha256": stored[name].sha256, "entries": entries}) + "\n")
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
        raise CheckpointError(
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
        raise CheckpointError(f"{path} is not as an interrupted run left it; remove {folder} and start again")
    stored[path.name] = StoredFile(size, line["sha256"])
    return [
        WriteResult(
            MetadataIndex(key, offsets), length, replace(like, relative_path=path.name, offset=start, length=length)
        )
        for key, offsets, start, length in line["entries"]
    ]
