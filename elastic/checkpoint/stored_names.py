"""Under which keys Megatron-Core stores each parameter in a checkpoint.

One parameter is one key, except that the packed rows of a Mamba mixer are stored block by block ([z, x, B, C, dt] and
[x, B, C]), so that each block can be split over tensor-parallel ranks on its own (MambaMixer.sharded_state_dict).
`tests/unit/test_stored_names.py` holds this table against the real model.
"""

from dataclasses import dataclass

from elastic.model.sharding import block_sizes
from elastic.space.nesting import DimKind, parameter_dims, parameter_size
from elastic.space.shape import ModelShape

_BLOCKS = {DimKind.IN_PROJ: ("z", "x", "B", "C", "dt"), DimKind.CONV: ("x", "B", "C")}


@dataclass(frozen=True)
class StoredPart:
    """One key of a checkpoint: rows `start` to `start + size[0]` of a parameter."""

    key: str
    start: int
    size: tuple[int, ...]


def stored_parts(name: str, shape: ModelShape) -> tuple[StoredPart, ...]:
    """Return the keys of one full parameter in row order; raises KeyError for a name the model does not have."""
    rows, *columns = parameter_size(name, shape)
    kind = parameter_dims(name)[0]
    if kind not in _BLOCKS:
        return (StoredPart(name, 0, (rows, *columns)),)
    # Megatron-Core's parameters are `conv1d_weight` and `conv1d_bias`, its keys those of the older `conv1d` module.
    stem = name.replace("conv1d_", "conv1d.")
    parts, start = [], 0
    for block, size in zip(_BLOCKS[kind], block_sizes(name, shape, dim=0), strict=True):
        parts.append(StoredPart(f"{stem}.{block}", start, (size, *columns)))
        start += size
    return tuple(parts)
