"""Read and write safetensors folders one tensor at a time, so that memory does not grow with the model."""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic.hf.safe_files import shown
from elastic.hf.tensor_index import INDEX_FILE, SINGLE_FILE, StoredTensor, TensorFileError

_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be before it exists."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.size).numel() * self.dtype.itemsize


def plan_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Deal tensors, in order, into files of at most `shard_bytes`; a larger tensor gets a file of its own."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.num_bytes
    return shards


def write_tensors(
    folder: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> int:
    """Write `tensors` as they come, converted to their spec's dtype, into one file or several with an index.

    Returns the bytes of all values. Raises TensorFileError unless exactly the announced tensors come, each once.
    """
    shards = plan_shards(specs, shard_bytes)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = [SINGLE_FILE] if count == 1 else names
    pending = dict(specs)
    with ExitStack() as stack:
        places: dict[str, tuple[Any, int]] = {}
        files = []
        for file_name, shard in zip(names, shards, strict=True):
            files.append(stack.enter_context(open(folder / file_name, "wb")))
            header, offsets = _header(shard)
            files[-1].write(header)
            places |= {name: (files[-1], len(header) + offset) for name, offset in offsets.items()}
        for name, tensor in tensors:
            spec = pending.pop(name, None)
            if spec is None or tuple(tensor.shape) != spec.size:
                raise TensorFileError(f"tensor {name} {tuple(tensor.shape)} was not announced, or came twice: {spec}")
            file, position = places[name]
            file.seek(position)
            values = tensor.detach().to("cpu", spec.dtype).contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            del tensor, values  # before the next one is read
        if pending:
            raise TensorFileError(f"{len(pending)} announced tensors never came: {', '.join(list(pending)[:4])}")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    total = sum(spec.num_bytes for spec in specs.values())
    if count > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _header(shard: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header and each tensor's offset behind it."""
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide types first: an fp32 tensor behind an odd number of bf16 values would not be aligned.
    for name in sorted(shard, key=lambda name: -shard[name].dtype.itemsize):
        spec = shard[name]
        offsets[name], end = end, end + spec.num_bytes
        entries[name] = {
            "dtype": _TYPE_NAMES[spec.dtype],
            "shape": list(spec.size),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


class TensorFolder(Mapping[str, Tensor]):
    """Tensors of a Hugging Face folder by name; each is read from its file when asked for.

    Made from headers that were checked; the keys may call a tensor otherwise than its file does.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        try:
            # Opened for each tensor: an open file would keep every page it has read in memory.
            with safe_open(stored.path, framework="pt") as file:
                return file.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise TensorFileError(f"{shown(stored.path.name)} was sound, but cannot be read now: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, in order."""
        return tuple(sorted({stored.path for stored in self._stored.values()}))

    def size(self, name: str) -> tuple[int, ...]:
        """Return a tensor's size without reading its values."""
        return self._stored[name].size
