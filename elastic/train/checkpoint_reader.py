"""Full parameters of a checkpoint by name, each read when asked for, whatever parallel layout wrote them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, TensorStorageMetadata

from elastic.compress.slicing import parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape
from elastic.train.checkpoint_manifest import damages, shown_problems
from elastic.train.checkpoint_metadata import CheckpointError, SafeReader
from elastic.train.stored_names import stored_parts


class StoredTensors(Mapping[str, Tensor]):
    """The parameters of a checkpoint under Megatron-Core names; memory holds one at a time.

    Needs no process group and no model. Raises CheckpointError for a checkpoint that is not whole (sizes; whoever
    opens it decides about checksums), and, listing the keys, for one that does not hold exactly the parameters of
    `shape` in their sizes.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        if found := damages(folder, full=False):
            raise CheckpointError(f"{folder} is not whole: {shown_problems(found)}")
        self._folder, self._shape, self._reader = folder, shape, SafeReader(folder)
        self._names = tuple(parameter_names(shape))
        self._stored = {
            key: entry
            for key, entry in self._reader.read_metadata().state_dict_metadata.items()
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
        tensor = torch.empty(parameter_size(name, self._shape), dtype=self.dtype(name))
        rows = {part.key: tensor.narrow(0, part.start, part.size[0]) for part in stored_parts(name, self._shape)}
        planner, metadata = DefaultLoadPlanner(), self._reader.read_metadata()
        planner.set_up_planner(rows, metadata, is_coordinator=True)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # a damaged file may raise anything
            raise CheckpointError(f"{self._folder} is damaged: {name} cannot be read ({error})") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format one parameter is stored in."""
        return self._stored[stored_parts(name, self._shape)[0].key].properties.dtype
