"""Read the index and the objects of a Megatron-Core checkpoint without running code from it.

Torch keeps the index (`.metadata`) as a pickle, and a pickle can call any function. This reader admits the plain data
classes an index is made of and nothing else, so a forged one is refused instead of executed. Beside tensors a
checkpoint holds a few objects (`common_state`: settings of the optimizer), pickles too; `refuse_code` looks at index
and objects before Megatron-Core, which unpickles both without a look, gets to see them.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import BytesStorageMetadata, Metadata

METADATA_FILE = ".metadata"
# Where older versions of Megatron-Core keep common_state: a pickle that it loads whenever it is there.
LEGACY_COMMON_FILE = "common.pt"
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
            _refuse_code_in_object(folder / stored.relative_path, index.fqn, stored.offset, stored.length)


def _refuse_code_in_object(path: Path, key: str, offset: int, length: int) -> None:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))
        torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: the object {key} is damaged or asks for code, and was not loaded: {reason}"
        ) from error
