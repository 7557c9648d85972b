"""Full parameters of a checkpoint by name, each read when asked for, whatever parallel layout wrote them."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import TensorStorageMetadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from elastic.checkpoint.manifest import damages, shown_problems
from elastic.checkpoint.metadata import CheckpointError, read_metadata
from elastic.checkpoint.stored_names import stored_parts
from elastic.rank.slicing import parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape


class StoredTensors(Mapping[str, Tensor]):
    """The parameters of a checkpoint under Megatron-Core names; memory holds one at a time.

    Needs no process group and no model. Raises CheckpointError for a checkpoint that is not whole (sizes; whoever
    opens it decides about checksums), and, listing the keys, for one that does not hold exactly the parameters of
    `shape` in their sizes.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        if found := damages(folder, full=False):
            raise CheckpointError(f"{folder} is not whole: {shown_problems(found)}")
        self._folder, self._shape, self._metadata = folder, shape, read_metadata(folder)
        self._names = tuple(parameter_names(shape))
        self._stored = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        problems = []
        for part in (part for name in self._names for part in stored_parts(name, shape)):
            if part.key not in self._stored:
                problems.append(f"{part.key} is missing")
            elif tuple(self._stored[part.key].size) != part.size:
                problems.append(f"{part.key} is {tuple(self._stored[part.key].size)}, expected {part.size}")
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise CheckpointError(f"{folder} does not fit its record: {'; '.join(problems[:4])}{more}")

    def __getitem__(self, name: str) -> Tensor:
        """Read one full parameter in the number format it is stored in."""
        parts = stored_parts(name, self._shape)
        if len(parts) == 1 and len(self._stored[parts[0].key].chunks) == 1:
            return self._read(parts[0].key, self._stored[parts[0].key].chunks[0])
        tensor = torch.empty(parameter_size(name, self._shape), dtype=self.dtype(name))
        for part in parts:
            rows = tensor.narrow(0, part.start, part.size[0])
            for chunk in self._stored[part.key].chunks:  # what one rank wrote
                region = tuple(
                    slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                rows[region] = self._read(part.key, chunk)
        return tensor

    def _read(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        extent = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self._folder / extent.relative_path
        try:
            with path.open("rb") as file:
                file.seek(extent.offset)
                stored = torch.load(io.BytesIO(file.read(extent.length)), map_location="cpu", weights_only=True)
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
