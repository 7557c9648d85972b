"""Safetensors folders: written tensor by tensor, read back by the library (broken ones: test_broken_hf_folder.py)."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elastic.hf.names import HfTensorError
from elastic.hf.tensor_files import TensorFolder, plan_shards, planned, write_tensors
from elastic.hf.tensor_index import INDEX_FILE, SINGLE_FILE, scan_tensors

TENSORS = {
    "odd": torch.randn(3).bfloat16(),
    "state": torch.randn(5),
    "matrix": torch.randn(7, 4).bfloat16(),
    "half": torch.randn(1, 1, 3).half(),
    "more": torch.randn(5),
}
SPECS = {name: planned(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def opened(folder: Path) -> TensorFolder:
    scan = scan_tensors(folder)
    assert not scan.problems
    return TensorFolder(scan.tensors)


def test_one_file_is_what_the_library_reads(tmp_path: Path) -> None:
    backwards = reversed(list(TENSORS.items()))
    total = write_tensors(tmp_path, SPECS, backwards, shard_bytes=1_000_000)
    assert total == sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]
    read = load_file(tmp_path / SINGLE_FILE)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_shards_hold_what_the_index_says(tmp_path: Path) -> None:
    write_tensors(tmp_path, SPECS, TENSORS.items(), shard_bytes=40)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    folder = opened(tmp_path)
    assert set(folder) == TENSORS.keys() and len(folder) == 5 and folder["matrix"].shape == (7, 4)
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
        assert torch.equal(folder[name], tensor)


def test_shards_stay_below_the_limit_unless_one_tensor_is_larger() -> None:
    specs = {str(number): planned((size,), torch.float32) for number, size in enumerate((1, 2, 9, 1, 1, 2))}
    assert [list(shard) for shard in plan_shards(specs, 16)] == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_values_are_converted_and_announced_sizes_enforced(tmp_path: Path) -> None:
    specs = {"a": planned((2,), torch.bfloat16)}
    write_tensors(tmp_path, specs, [("a", torch.tensor([1.0, 1.001]))], 100)
    assert opened(tmp_path)["a"].tolist() == [1.0, 1.0]
    with pytest.raises(HfTensorError, match=r"tensor a \(3,\) was not announced"):
        write_tensors(tmp_path, specs, [("a", torch.zeros(3))], 100)
    with pytest.raises(HfTensorError, match="came twice"):
        write_tensors(tmp_path, specs, [("a", torch.zeros(2))] * 2, 100)
    with pytest.raises(HfTensorError, match="never came: a"):
        write_tensors(tmp_path, specs, [], 100)


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    """The writer must ask for a tensor only when the one before is on disk and forgotten."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def made(name: str) -> tuple[str, torch.Tensor]:
        assert all(reference() is None for reference in alive)
        tensor = TENSORS[name].clone()
        alive.append(weakref.ref(tensor))
        return name, tensor

    write_tensors(tmp_path, SPECS, (made(name) for name in SPECS), 40)
    assert len(alive) == 5
