"""Read the index of a Megatron-Core checkpoint without running code from it.

Torch keeps the index (`.metadata`) as a pickle, and a pickle can call any function. This reader admits the plain data
classes an index is made of and nothing else, so a forged one is refused instead of executed.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata

METADATA_FILE = ".metadata"
_ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    # Megatron-Core leaves the plans of all ranks in its index.
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or does not fit."""


class _DataOnly(pickle.Unpickler):
    """Builds the classes of an index; anything else ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's index; raises CheckpointError when it is missing, damaged, or asks for code."""
    path = folder / METADATA_FILE
    try:
        metadata = _DataOnly(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no {METADATA_FILE}: it is no checkpoint, or an unfinished one"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is damaged or unsafe and was not read: {error}; take another copy") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is damaged: it holds a {type(metadata).__name__}, not an index")
    return metadata


class SafeReader(FileSystemReader):
    """Torch's reader with the index read once and safely."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata = read_metadata(folder)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return the index."""
        return self._metadata
