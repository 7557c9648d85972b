"""Read and write safetensors folders one tensor at a time, so that memory does not grow with the model."""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic.hf.fp8 import dequantised
from elastic.hf.names import HfTensorError
from elastic.hf.safe_files import UnsafeFileError, shown
from elastic.hf.tensor_index import INDEX_FILE, SINGLE_FILE, StoredTensor

_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}


def planned(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return what a tensor will be before it exists: size and number format, without values."""
    return torch.empty(size, dtype=dtype, device="meta")


def plan_shards(plan: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Deal planned tensors, in order, into files of at most `shard_bytes`; a larger tensor gets a file of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in plan.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def write_tensors(
    folder: Path,
    plan: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int,
    progress: Callable[[int, int], None] = lambda num_bytes, total: None,
) -> int:
    """Write `tensors` as they come, in the number formats of the plan, into one file or several with an index.

    Returns the bytes of all values; `progress` is told those of each written tensor and of all. Raises HfTensorError
    unless exactly the planned tensors come, each once.
    """
    shards, total = plan_shards(plan, shard_bytes), sum(tensor.nbytes for tensor in plan.values())
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [SINGLE_FILE] if len(shards) == 1 else names
    pending = dict(plan)
    with ExitStack() as stack:
        places: dict[str, tuple[Any, int]] = {}
        files = [stack.enter_context(open(folder / name, "wb")) for name in names]
        for file, shard in zip(files, shards, strict=True):
            header, offsets = _header(shard)
            file.write(header)
            places |= {name: (file, len(header) + offset) for name, offset in offsets.items()}
        for name, tensor in tensors:
            wanted = pending.pop(name, None)
            if wanted is None or tensor.shape != wanted.shape:
                raise HfTensorError(f"tensor {name} {tuple(tensor.shape)} was not announced, or came twice")
            file, position = places[name]
            file.seek(position)
            values = tensor.detach().to("cpu", wanted.dtype).contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            del tensor, values  # before the next one is read
            progress(wanted.nbytes, total)
        if pending:
            raise HfTensorError(f"{len(pending)} announced tensors never came: {', '.join(list(pending)[:4])}")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _header(shard: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header and each tensor's offset behind it."""
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide types first: an fp32 tensor behind an odd number of bf16 values would not be aligned.
    for name, tensor in sorted(shard.items(), key=lambda entry: -entry[1].dtype.itemsize):
        offsets[name], end = end, end + tensor.nbytes
        place = {"shape": list(tensor.shape), "data_offsets": [offsets[name], end]}
        entries[name] = {"dtype": _TYPE_NAMES[tensor.dtype], **place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


class TensorFolder(Mapping[str, Tensor]):
    """Tensors of a Hugging Face folder by name; each is read from its file when asked for.

    Made from headers that were checked; the keys may call a tensor otherwise than its file does. FP8 codes come as the
    numbers they stand for, fp32.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        values = self._read(stored)
        return values if stored.scales is None else dequantised(values, self._read(stored.scales), stored.block)

    def _read(self, stored: StoredTensor) -> Tensor:
        try:
            # Opened for each tensor: an open file would keep every page it has read in memory.
            with safe_open(stored.path, framework="pt") as file:
                return file.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise UnsafeFileError(f"{shown(stored.path.name)} was sound, but cannot be read now: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, in order."""
        scales = (stored.scales.path for stored in self._stored.values() if stored.scales is not None)
        return tuple(sorted({*(stored.path for stored in self._stored.values()), *scales}))
