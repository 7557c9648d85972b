"""Find and check every tensor of a Hugging Face folder, in one file or in shards: everything but its values.

The safetensors library checks a header when it opens a file, but stops at the first problem and gives no numbers. Here
a hundred gigabytes are judged in a second and every damage is named.
"""

import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.hf.safe_files import UnsafeFileError, listed, open_regular, parse_json, read_json, shown

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


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header says: where its values begin, under which name, and what it will be.

    `scales` are those of FP8 codes, `block` the rows and columns that one of them stands for (hf/fp8.py).
    """

    path: Path
    name: str
    dtype: str
    size: tuple[int, ...]
    begin: int
    num_bytes: int
    scales: "StoredTensor | None" = None
    block: tuple[int, int] = (1, 1)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, without reading a value.

    Raises UnsafeFileError if the file is missing, not regular, truncated, longer than its header says, or if its
    header is damaged: absurd length, not JSON, unknown type, tensors that overlap or leave holes.
    """
    file_name = shown(path.name)
    try:
        with open_regular(path) as file:
            file_bytes, prefix = os.fstat(file.fileno()).st_size, file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                too_few = f"{file_bytes} bytes are too few for a safetensors file"
                raise UnsafeFileError(f"{file_name} is truncated: {too_few}")
            header_bytes = struct.unpack("<Q", prefix)[0]
            end_of_header = _LENGTH_BYTES + header_bytes
            if header_bytes > _MAX_HEADER_BYTES:
                raise UnsafeFileError(
                    f"{file_name} is not a safetensors file, or damaged: it announces a header of {header_bytes:,} "
                    f"bytes, more than {_MAX_HEADER_BYTES:,}"
                )
            if end_of_header > file_bytes:
                raise _truncated(file_name, file_bytes, f"alone ends at {end_of_header:,}")
            entries = parse_json(file.read(header_bytes), f"header of {path.name}")
    except OSError as error:
        raise UnsafeFileError(f"{file_name} cannot be read: {error.strerror}") from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeFileError(f"header of {file_name} is damaged: __metadata__ must map text to text")
    tensors = {name: _entry(name, entry, path) for name, entry in entries.items()}
    needed = end_of_header + _contiguous_end(tensors.values(), file_name)
    if file_bytes < needed:
        raise _truncated(file_name, file_bytes, f"promises {needed:,}")
    if file_bytes > needed:
        raise UnsafeFileError(f"{file_name} has {file_bytes:,} bytes, but its header describes only {needed:,}")
    return tensors


def _truncated(file_name: str, file_bytes: int, says: str) -> UnsafeFileError:
    there = f"{file_name} is truncated: {file_bytes:,} bytes are there"
    return UnsafeFileError(f"{there}, its header {says}; download or copy it again")


def _entry(name: str, entry: Any, path: Path) -> StoredTensor:
    """Return one tensor; raises UnsafeFileError if type, size and place of its values do not fit together."""
    where = f"header of {shown(path.name)} is damaged: {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UnsafeFileError(f"{where} has no dtype, shape and data_offsets")
    dtype, size, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UnsafeFileError(f"{where} has the unknown type {shown(dtype)}")
    if not _counts(size) or not _counts(offsets) or len(offsets) != 2:
        raise UnsafeFileError(f"{where} has shape {shown(size)} and data_offsets {shown(offsets)}")
    num_bytes, bits = offsets[1] - offsets[0], math.prod(size) * _BITS[dtype]
    if bits != 8 * num_bytes:
        raise UnsafeFileError(
            f"{where} has {num_bytes:,} bytes (data_offsets {shown(offsets)}), but {dtype} of shape {shown(size)} "
            f"takes {shown(-(-bits // 8))}"
        )
    return StoredTensor(path, name, dtype, tuple(size), offsets[0], num_bytes)


def _counts(value: Any) -> bool:
    """Tell whether a value is a short list of integers that fit an address."""
    fits = isinstance(value, list) and len(value) <= 8
    return fits and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _contiguous_end(tensors: Iterable[StoredTensor], file_name: str) -> int:
    """Return where the values end; raises UnsafeFileError if two tensors overlap or bytes belong to none."""
    filled, before = 0, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.num_bytes)):
        if tensor.begin != filled:
            what = "overlaps" if tensor.begin < filled else "leaves a hole behind"
            raise UnsafeFileError(
                f"header of {file_name} is damaged: {shown(tensor.name)} begins at {tensor.begin:,}, it {what} "
                f"{shown(before)}, which ends at {filled:,}"
            )
        filled, before = tensor.begin + tensor.num_bytes, tensor.name
    return filled


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_PLAIN_NAME = r"""[^./\\:*?"<>|][^/\\:*?"<>|]*\.safetensors"""
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_INDEX_BYTES = 32_000_000


@dataclass
class TensorScan:
    """What a folder holds: tensors by stored name, names whose shard cannot be read, problems and warnings."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def scan_tensors(folder: Path) -> TensorScan:
    """Read the index and every header of a folder, never a value; problems are collected, not raised.

    Only safetensors are read, because loading a pickle runs code from the file; only files that lie, or are linked,
    directly in the folder, whatever the index says.
    """
    scan = TensorScan()
    has_single, has_index = (os.path.lexists(folder / name) for name in (SINGLE_FILE, INDEX_FILE))
    try:
        if has_single and has_index:
            both = f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}"
            scan.problems.append(f"{both}, two models at once; remove the one that is stale")
        elif has_single:
            scan.tensors = read_header(folder / SINGLE_FILE)
        elif has_index:
            _scan_shards(folder, scan)
        else:
            scan.problems.append(_nothing_found(folder))
    except UnsafeFileError as error:
        scan.problems.append(str(error))
    read = {tensor.path.name for tensor in scan.tensors.values()} | {SINGLE_FILE}
    others = {path.name for path in folder.iterdir() if path.name.endswith((_SUFFIX, *_PICKLE_SUFFIXES))}
    if (unread := others - read) and not scan.problems:
        scan.warnings.append(f"not read, because no index names it: {listed(unread)}")
    return scan


def _scan_shards(folder: Path, scan: TensorScan) -> None:
    try:
        index = read_json(folder / INDEX_FILE, _MAX_INDEX_BYTES)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{INDEX_FILE} is not a valid index: {error}") from error
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict):
        raise UnsafeFileError(f"{INDEX_FILE} is not a valid index: it has no weight_map from tensors to files")
    if not weight_map:
        scan.problems.append(f"{INDEX_FILE} names no tensors")
    wanted: dict[str, set[str]] = defaultdict(set)
    refused: dict[str, str] = {}
    for name, file in weight_map.items():
        if _is_plain_file_name(file):
            wanted[file].add(name)
        else:
            scan.unread.add(name)
            refused.setdefault(repr(file), name)
    scan.problems += [
        f"{INDEX_FILE} points to {shown(file)} for {shown(name)}; only safetensors files beside it are read"
        for file, name in refused.items()
    ]
    held: dict[str, list[str]] = defaultdict(list)
    for file in sorted(wanted):
        for name in _scan_shard(folder / file, wanted[file], weight_map.keys(), scan):
            held[name].append(file)
    scan.problems += [
        f"{shown(name)} is stored twice, in {' and '.join(map(shown, files))}; one model cannot have both"
        for name, files in held.items()
        if len(files) > 1
    ]
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    there = sum(tensor.num_bytes for tensor in scan.tensors.values())
    if said not in (None, there) and not scan.problems:  # only a warning, for every shard was checked by itself
        scan.warnings.append(
            f"{INDEX_FILE} says total_size = {shown(said)}, the shards hold {there} bytes of values; the shards are "
            f"complete by their own headers, so the index is ignored in this"
        )


def _scan_shard(path: Path, wanted: set[str], indexed: Set[str], scan: TensorScan) -> Set[str]:
    """Add one shard's tensors to the scan; returns the names of all that it holds."""
    try:
        found = read_header(path)
    except UnsafeFileError as error:
        scan.unread |= wanted
        why = f"cannot be used: {error}" if os.path.lexists(path) else f"is missing from {path.parent}"
        scan.problems.append(f"shard {shown(path.name)} {why} ({len(wanted)} tensors: {listed(wanted)})")
        return set()
    disagree, absent = f"{INDEX_FILE} and {shown(path.name)} disagree about", wanted - found.keys()
    if absent:
        why = "the index says the file holds it, the file does not"
        scan.problems.append(f"{disagree}: {listed(absent)}; {why}")
    if surplus := found.keys() - indexed:
        scan.problems.append(f"{disagree}: {listed(surplus)}; the file holds it, the index does not name it")
    scan.unread |= absent
    scan.tensors |= {name: found[name] for name in wanted & found.keys()}
    return found.keys()


def _is_plain_file_name(file: object) -> bool:
    """Tell whether an index entry names a safetensors file in its own folder and nothing cleverer."""
    return isinstance(file, str) and file.isprintable() and re.fullmatch(_PLAIN_NAME, file) is not None


def _nothing_found(folder: Path) -> str:
    text = f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}"
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(_SUFFIX)]
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if shards:
        return f"{text}; {len(shards)} shards are there ({listed(shards)}), copy the index that belongs to them, too"
    if pickles:
        return f"{text}; {pickles[0]} is a pickle, which can run code when loaded; convert it to safetensors"
    return text
