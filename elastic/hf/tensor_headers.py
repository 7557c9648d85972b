"""Read and check the header of a safetensors file: everything about its tensors but their values.

The library checks the same when it opens a file, but stops at the first problem and gives no numbers. Here a
hundred gigabytes are judged in a second and the damage is named.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.hf.safe_files import UnsafeFileError, open_regular, parse_json, shown

# A shard of the largest published hybrid needs a hundred thousand; the library's own bound is 100 MB.
_MAX_HEADER_BYTES = 16_000_000
_LENGTH_BYTES = 8
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class TensorFileError(ValueError):
    """A folder of tensors that is incomplete, damaged, unsafe to read, or not what was announced."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header says: where it is, under which name, and what it will be."""

    path: Path
    name: str
    dtype: str
    size: tuple[int, ...]
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, without reading a value.

    Raises TensorFileError if the file is missing, not regular, truncated, longer than its header says, or if its
    header is damaged: absurd length, not JSON, unknown type, tensors that overlap or leave holes.
    """
    file_name = shown(path.name)
    try:
        with open_regular(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = _header_length(file.read(_LENGTH_BYTES), file_bytes, file_name)
            entries = parse_json(file.read(header_bytes), f"header of {path.name}")
    except UnsafeFileError as error:
        raise TensorFileError(str(error)) from error
    except OSError as error:
        raise TensorFileError(f"{file_name} cannot be read: {error.strerror}") from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"header of {file_name} is damaged: __metadata__ must map text to text")
    places = {name: _entry(name, entry, path) for name, entry in entries.items()}
    end = _contiguous_end(places, file_name)
    needed = _LENGTH_BYTES + header_bytes + end
    if file_bytes < needed:
        raise TensorFileError(
            f"{file_name} is truncated: {file_bytes:,} bytes are there, its header promises {needed:,}; download or "
            f"copy it again"
        )
    if file_bytes > needed:
        raise TensorFileError(f"{file_name} has {file_bytes:,} bytes, but its header describes only {needed:,}")
    return {name: tensor for name, (tensor, _, _) in places.items()}


def _header_length(prefix: bytes, file_bytes: int, file_name: str) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise TensorFileError(f"{file_name} is truncated: {file_bytes} bytes are too few for a safetensors file")
    length = struct.unpack("<Q", prefix)[0]
    if length > _MAX_HEADER_BYTES:
        raise TensorFileError(
            f"{file_name} is not a safetensors file, or damaged: it announces a header of {length:,} bytes, more than "
            f"{_MAX_HEADER_BYTES:,}"
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise TensorFileError(
            f"{file_name} is truncated: {file_bytes:,} bytes are there, its header alone ends at "
            f"{_LENGTH_BYTES + length:,}; download or copy it again"
        )
    return length


def _entry(name: str, entry: Any, path: Path) -> tuple[StoredTensor, int, int]:
    """Return one tensor with the begin and end of its values; raises TensorFileError if they do not fit together."""
    where = f"header of {shown(path.name)} is damaged: {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise TensorFileError(f"{where} has no dtype, shape and data_offsets")
    dtype, size, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise TensorFileError(f"{where} has the unknown type {shown(dtype)}")
    if not _counts(size) or not _counts(offsets) or len(offsets) != 2:
        raise TensorFileError(f"{where} has shape {shown(size)} and data_offsets {shown(offsets)}")
    begin, end = offsets
    bits = math.prod(size) * _BITS[dtype]
    if end < begin or bits != 8 * (end - begin):
        raise TensorFileError(
            f"{where} has {end - begin:,} bytes (data_offsets {shown(offsets)}), but {dtype} of shape {shown(size)} "
            f"takes {shown(-(-bits // 8))}"
        )
    return StoredTensor(path, name, dtype, tuple(size), end - begin), begin, end


def _counts(value: Any) -> bool:
    """Tell whether a value is a short list of integers that fit an address."""
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _contiguous_end(places: dict[str, tuple[StoredTensor, int, int]], file_name: str) -> int:
    """Return where the values end; raises TensorFileError if two tensors overlap or bytes belong to none."""
    filled, before = 0, "the header"
    for name, (_, begin, end) in sorted(places.items(), key=lambda place: place[1][1:]):
        if begin != filled:
            what = "overlaps" if begin < filled else "leaves a hole behind"
            raise TensorFileError(
                f"header of {file_name} is damaged: {shown(name)} begins at {begin:,}, it {what} {shown(before)}, "
                f"which ends at {filled:,}"
            )
        filled, before = end, name
    return filled
