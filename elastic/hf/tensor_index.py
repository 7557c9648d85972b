"""Find every tensor of a Hugging Face folder, in one file or in shards, and every problem on the way."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from elastic.hf.safe_files import UnsafeFileError, listed, read_json, shown
from elastic.hf.tensor_headers import StoredTensor, TensorFileError, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
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
    """Read the index and every header below `folder`, never a value; problems are collected, not raised.

    Only safetensors are read, because loading a pickle runs code from the file; only files that lie, or are linked,
    directly in the folder, whatever the index says.
    """
    scan = TensorScan()
    if not folder.is_dir():
        scan.problems.append(f"{folder} is not a folder")
        return scan
    has_single, has_index = (os.path.lexists(folder / name) for name in (SINGLE_FILE, INDEX_FILE))
    if has_single and has_index:
        scan.problems.append(
            f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}, two models at once; remove the one that is stale"
        )
    elif has_single:
        _scan_single(folder / SINGLE_FILE, scan)
    elif has_index:
        _scan_shards(folder, scan)
    else:
        scan.problems.append(_nothing_found(folder))
    _warn_of_others(folder, scan)
    return scan


def _scan_single(path: Path, scan: TensorScan) -> None:
    try:
        scan.tensors = read_header(path)
    except TensorFileError as error:
        scan.problems.append(str(error))


def _scan_shards(folder: Path, scan: TensorScan) -> None:
    try:
        index = read_json(folder / INDEX_FILE, _MAX_INDEX_BYTES)
    except UnsafeFileError as error:
        scan.problems.append(f"{INDEX_FILE} is not a valid index: {error}")
        return
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        scan.problems.append(f"{INDEX_FILE} is not a valid index: it has no weight_map from tensors to files")
        return
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
        _scan_shard(folder / file, wanted[file], weight_map.keys(), held, scan)
    scan.problems += [
        f"{shown(name)} is stored twice, in {' and '.join(map(shown, files))}; one model cannot have both"
        for name, files in held.items()
        if len(files) > 1
    ]
    if not scan.problems:
        _check_total(index, scan)


def _scan_shard(
    path: Path, wanted: set[str], indexed: Iterable[str], held: dict[str, list[str]], scan: TensorScan
) -> None:
    """Add one shard's tensors to the scan; `held` collects the files in which each name was found."""
    try:
        found = read_header(path)
    except TensorFileError as error:
        scan.unread |= wanted
        missing = not os.path.lexists(path)
        why = f"is missing from {path.parent}" if missing else f"cannot be used: {error}"
        scan.problems.append(f"shard {shown(path.name)} {why} ({len(wanted)} tensors: {listed(wanted)})")
        return
    for name in found:
        held[name].append(path.name)
    if absent := wanted - found.keys():
        scan.unread |= absent
        scan.problems.append(
            f"{INDEX_FILE} and {shown(path.name)} disagree about: {listed(absent)}; the index says the file holds "
            f"it, the file does not"
        )
    known = set(indexed)
    if surplus := found.keys() - known:
        scan.problems.append(
            f"{INDEX_FILE} and {shown(path.name)} disagree about: {listed(surplus)}; the file holds it, the index "
            f"does not name it"
        )
    scan.tensors |= {name: found[name] for name in wanted & found.keys()}


def _is_plain_file_name(file: object) -> bool:
    """Tell whether an index entry names a safetensors file in its own folder and nothing cleverer."""
    return (
        isinstance(file, str)
        and file.isprintable()
        and Path(file).name == file
        and not set(file) & set('/\\:*?"<>|')
        and file.endswith(_SUFFIX)
        and not file.startswith(".")
    )


def _check_total(index: dict, scan: TensorScan) -> None:
    """Compare the index's total with the headers': only a warning, for every shard was checked by itself."""
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    there = sum(tensor.num_bytes for tensor in scan.tensors.values())
    if said is not None and said != there:
        scan.warnings.append(
            f"{INDEX_FILE} says total_size = {shown(said)}, the shards hold {there} bytes of values; the shards are "
            f"complete by their own headers, so the index is ignored in this"
        )


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


def _warn_of_others(folder: Path, scan: TensorScan) -> None:
    """Say which files beside the tensors that were read look like weights and are left alone."""
    read = {tensor.path.name for tensor in scan.tensors.values()} | {SINGLE_FILE}
    others = [path.name for path in folder.iterdir() if path.name.endswith((_SUFFIX, *_PICKLE_SUFFIXES))]
    if (unread := set(others) - read) and not scan.problems:
        scan.warnings.append(f"not read, because no index names it: {listed(unread)}")
