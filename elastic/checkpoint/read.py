"""Read a checkpoint without running code from it: its index, its objects, and full parameters by name.

Torch keeps the index (`.metadata`) as a pickle, and a pickle can call any function. This reader admits the plain data
classes an index is made of and nothing else, so a forged one is refused instead of executed. Beside tensors a
checkpoint holds a few objects (`common_state`: settings of the optimizer), pickles too; `refuse_code` looks at index
and objects before Megatron-Core, which unpickles both without a look, gets to see them.

One parameter is one key of the index, except that the packed rows of a Mamba mixer are stored block by block ([z, x, B,
C, dt] and [x, B, C]), so that each block can be split over tensor-parallel ranks on its own
(MambaMixer.sharded_state_dict). tests/distributed/test_streamed_checkpoint.py holds this table against the real model.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from elastic.checkpoint.contents import CheckpointError, check_whole, shown_problems
from elastic.model.sharding import block_sizes
from elastic.space.layers import parameter_dims, parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape

METADATA_FILE = ".metadata"
# Where older versions of Megatron-Core keep common_state: a pickle that it loads whenever it is there.
LEGACY_COMMON_FILE = "common.pt"
_ADMITTED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    # Megatron-Core leaves the plans of all ranks in its index.
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.serialization": "_get_layout",
    "torch": "Size float32 bfloat16 float16 float64 int64 int32 uint8 bool",
    "collections": "OrderedDict",
    "pathlib": "Path PosixPath",
}


class _DataOnly(pickle.Unpickler):
    """Builds the classes of an index; anything else ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ADMITTED.get(module, "").split():
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's index; raises CheckpointError when it is missing, damaged, or asks for code."""
    path = folder / METADATA_FILE
    try:
        metadata = _DataOnly(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {METADATA_FILE}: it is no checkpoint, or an unfinished one") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is damaged or unsafe and was not read: {error}; take another copy") from error
    try:
        names = {Path(stored.relative_path) for stored in metadata.storage_data.values()}
        keys = {index.fqn for index in metadata.storage_data}
        is_index = keys.issuperset(metadata.state_dict_metadata)
    except (AttributeError, TypeError):
        is_index = False
    if not isinstance(metadata, Metadata) or not is_index:
        raise CheckpointError(f"{path} is damaged: it holds a {type(metadata).__name__}, not a whole index")
    outside = [str(name) for name in names if name.name != str(name)]
    if outside:
        raise CheckpointError(f"{path} points out of the folder, to {outside[0]}, and is not followed")
    return metadata


def refuse_code(folder: Path) -> None:
    """Raise CheckpointError for a checkpoint in which a pickle asks for more than plain data; nothing of it is run.

    Afterwards Megatron-Core may load it: its unrestricted unpickler reads the same bytes.
    """
    if (folder / LEGACY_COMMON_FILE).exists():
        raise CheckpointError(f"{folder} holds {LEGACY_COMMON_FILE}, a pickle that can run code; it is not loaded")
    metadata = read_metadata(folder)
    for index, stored in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            path = folder / stored.relative_path
            try:
                _loaded(path, stored)
            except Exception as error:  # a damaged pickle may raise anything
                what = f"{path}: the object {index.fqn} is damaged or asks for code, and was not loaded"
                raise CheckpointError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, or what kind it is; of all ranks' the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _loaded(path: Path, extent: Any) -> Any:
    """Load one stored value if it is plain data; raises whatever a damaged pickle may."""
    with path.open("rb") as file:
        file.seek(extent.offset)
        return torch.load(io.BytesIO(file.read(extent.length)), map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class StoredPart:
    """One key of a checkpoint: rows `start` to `start + size[0]` of a parameter."""

    parameter: str
    key: str
    start: int
    size: tuple[int, ...]


def stored_parts(name: str, shape: ModelShape) -> tuple[StoredPart, ...]:
    """Return the keys of one full parameter in row order; raises KeyError for a name the model does not have."""
    rows, *columns = parameter_size(name, shape)
    kind = parameter_dims(name)[0]
    blocks = kind.blocks
    if kind.is_interleaved or len(blocks) == 1:
        return (StoredPart(name, name, 0, (rows, *columns)),)
    # Megatron-Core's parameters are `conv1d_weight` and `conv1d_bias`, its keys those of the older `conv1d` module.
    stem = name.replace("conv1d_", "conv1d.")
    parts, start = [], 0
    for block, size in zip(blocks, block_sizes(name, shape, dim=0), strict=True):
        parts.append(StoredPart(name, f"{stem}.{block}", start, (size, *columns)))
        start += size
    return tuple(parts)


class StoredTensors(Mapping[str, Tensor]):
    """The parameters of a checkpoint under Megatron-Core names; memory holds one at a time.

    Needs no process group and no model. Raises CheckpointError for a checkpoint that is not whole (sizes; whoever
    opens it decides about checksums), and, listing the keys, for one that does not hold exactly the parameters of
    `shape` in their sizes.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        check_whole(folder)
        self._folder, self._shape, self._metadata = folder, shape, read_metadata(folder)
        self._names = tuple(parameter_names(shape))
        entries = self._metadata.state_dict_metadata.items()
        self._stored = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        problems = []
        for part in (part for name in self._names for part in stored_parts(name, shape)):
            if part.key not in self._stored:
                problems.append(f"{part.key} is missing")
            elif tuple(self._stored[part.key].size) != part.size:
                problems.append(f"{part.key} is {tuple(self._stored[part.key].size)}, expected {part.size}")
        if problems:
            raise CheckpointError(f"{folder} does not fit its record: {shown_problems(problems)}")

    def __getitem__(self, name: str) -> Tensor:
        """Read one full parameter in the number format it is stored in."""
        parts = stored_parts(name, self._shape)
        if len(parts) == 1 and len(self._stored[parts[0].key].chunks) == 1:
            return self._read(parts[0].key, self._stored[parts[0].key].chunks[0])
        tensor = torch.empty(parameter_size(name, self._shape), dtype=self.dtype(name))
        for part in parts:
            rows = tensor.narrow(0, part.start, part.size[0])
            for chunk in self._stored[part.key].chunks:  # what one rank wrote
                region = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
                rows[*region] = self._read(part.key, chunk)
        return tensor

    def _read(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        extent = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self._folder / extent.relative_path
        try:
            stored = _loaded(path, extent)
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{path}: {key} cannot be read, the file is truncated or damaged: {error}") from error
        if not isinstance(stored, Tensor) or stored.shape != chunk.sizes:
            found = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
            raise CheckpointError(f"{path}: {key} is {found}, the index says {tuple(chunk.sizes)}")
        return stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format one parameter is stored in."""
        return self._stored[stored_parts(name, self._shape)[0].key].properties.dtype
