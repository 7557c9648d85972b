"""A checkpoint written file by file is Megatron-Core's own: it loads at every layout, and both kinds are read back."""

import errno
import hashlib
import json
import shutil
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from elastic.checkpoint import write as checkpoint_write
from elastic.checkpoint.contents import CheckpointError, damages, writing_folder
from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.read import METADATA_FILE, StoredTensors, read_metadata, stored_parts
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import Trainable, begin_save, load_checkpoint
from elastic.checkpoint.stream import JOURNAL, save_streamed, stored_bytes
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.model.sharding import shard_tensor
from elastic.space.layers import parameter_names
from elastic.space.shape import ModelShape
from elastic.world.groups import Layout, join_world
from tests.distributed.harness import run_distributed
from tests.parity.model_factory import SPACES, build_stock, lively_tensor, one_process, shape_of, submodel_space

SHAPES = {name: space.parent for name, space in SPACES.items()} | {
    "four groups, odd channels, tied": shape_of("M-*M", mamba_groups=4, head_channels=5, tied_embeddings=True)
}
SPLITTABLE = shape_of("M-*M-", mamba_groups=4, mamba_heads=8, attention_heads=8, kv_heads=4, vocab=64)


def mixed_dtypes(shape: ModelShape) -> dict[str, torch.dtype]:
    """Return the usual mixture: bf16, and fp32 for A_log and D."""
    return {
        name: torch.float32 if name.endswith(("A_log", ".D")) else torch.bfloat16 for name in parameter_names(shape)
    }


def write(folder: Path, shape: ModelShape, identity: str = "a test", source=None) -> dict[str, Tensor]:
    """Write lively tensors and return what must come back."""
    dtypes = mixed_dtypes(shape)
    save_streamed(
        folder, Record("parent", shape), dtypes, source or (lambda name: lively_tensor(name, shape)), identity=identity
    )
    return {name: lively_tensor(name, shape).to(dtype) for name, dtype in dtypes.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_keys_is_megatron_cores(name: str) -> None:
    shape = SHAPES[name]
    with one_process():
        sharded = build_stock(shape).sharded_state_dict()
    parts = {}
    for entry in sharded.values():
        flat = entry.build() if hasattr(entry, "build") else entry
        for tensor in flat.values() if isinstance(flat, dict) else flat if isinstance(flat, list) else [flat]:
            if isinstance(tensor, ShardedTensor):
                parts[tensor.key] = tuple(tensor.global_shape)
    ours = {part.key: part.size for name in parameter_names(shape) for part in stored_parts(name, shape)}
    assert ours == parts


@pytest.mark.parametrize("name", SHAPES)
def test_what_was_streamed_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    expected = write(tmp_path / "step_00000000", shape)
    stored = StoredTensors(tmp_path / "step_00000000", shape)
    assert list(stored) == list(expected)
    for name, tensor in expected.items():
        assert stored.dtype(name) == tensor.dtype == stored[name].dtype and torch.equal(stored[name], tensor)
    values = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert stored_bytes(shape, mixed_dtypes(shape)) == values


def loaded_equals(folder: Path, layout: Layout) -> None:
    """Load into this rank's part of a model and compare with the shard of each full tensor."""
    here = join_world(layout, torch.device("cpu"))
    model = build_model(submodel_space(SPLITTABLE), layout)
    load_checkpoint(folder, Trainable(model))
    dtypes, tp = mixed_dtypes(SPLITTABLE), here.groups.tp
    for name, parameter in named_global_parameters(model):
        full = lively_tensor(name, SPLITTABLE).to(dtypes[name])
        assert torch.equal(parameter, shard_tensor(full, name, SPLITTABLE, tp.rank(), tp.size()).to(parameter.dtype))


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dtype=torch.bfloat16), Layout(tensor=2), Layout(pipeline=2), Layout(tensor=2, pipeline=2)],
    ids=["fp32", "bf16", "TP2", "PP2", "TP2 x PP2"],
)
def test_it_loads_at_every_layout(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "step_00000000", SPLITTABLE)
    run_distributed(loaded_equals, layout.tensor * layout.pipeline, tmp_path / "step_00000000", layout)


def save_split(folder: Path) -> None:
    layout = Layout(tensor=2, pipeline=2)
    here = join_world(layout, torch.device("cpu"))
    model = build_model(submodel_space(SPLITTABLE), layout)
    with torch.no_grad():
        for name, parameter in named_global_parameters(model):
            full = lively_tensor(name, SPLITTABLE)
            parameter.copy_(shard_tensor(full, name, SPLITTABLE, here.groups.tp.rank(), here.groups.tp.size()))
    begin_save(folder, Trainable(model), Record("parent", SPLITTABLE), None, here).finish()


def test_full_tensors_are_read_from_a_checkpoint_of_four_ranks(tmp_path: Path) -> None:
    run_distributed(save_split, 4, tmp_path / "step_00000003")
    stored = StoredTensors(tmp_path / "step_00000003", SPLITTABLE)
    for name in parameter_names(SPLITTABLE):
        assert torch.equal(stored[name], lively_tensor(name, SPLITTABLE)), name
    keys = read_metadata(tmp_path / "step_00000003").state_dict_metadata
    assert not [key for key in keys if "_extra_state" in key], "a pickle nobody needs"


def test_only_one_tensor_of_the_source_is_alive(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def source(name: str) -> Tensor:
        assert sum(reference() is not None for reference in alive) == 0
        tensor = lively_tensor(name, SPLITTABLE)
        alive.append(weakref.ref(tensor))
        return tensor

    dtypes = {name: torch.bfloat16 for name in parameter_names(SPLITTABLE)}
    save_streamed(tmp_path / "step_00000000", Record("parent", SPLITTABLE), dtypes, source, identity="a test")
    assert len(alive) == len(dtypes)


class KilledError(Exception):
    """Stands for a kill in the middle of a tensor."""


def interrupted(folder: Path, after: int, identity: str = "a test") -> None:
    """Write until `after` parameters were read, then fail."""
    count = 0

    def source(name: str) -> Tensor:
        nonlocal count
        count += 1
        if count > after:
            raise KilledError
        return lively_tensor(name, SPLITTABLE)

    with pytest.raises(KilledError):
        write(folder, SPLITTABLE, identity, source)


def test_a_killed_write_looks_unfinished_and_is_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000000"
    interrupted(folder, after=12)
    assert not folder.exists() and not (writing_folder(folder) / METADATA_FILE).exists()
    with (writing_folder(folder) / JOURNAL).open("a") as journal:
        journal.write('{"file": "__2_0.dis')  # killed while noting a file as finished
    read: list[str] = []

    def source(name: str) -> Tensor:
        read.append(name)
        return lively_tensor(name, SPLITTABLE)

    expected = write(folder, SPLITTABLE, source=source)
    assert 0 < len(read) < len(expected) and not [name for name in read if "word_embeddings" in name]
    stored = StoredTensors(folder, SPLITTABLE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert not writing_folder(folder).exists() and not (folder / JOURNAL).exists()


def test_a_failure_in_the_last_step_costs_nothing_that_is_finished(tmp_path: Path) -> None:
    def full_disk(*arguments, **named) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def source(name: str) -> Tensor:
        raise AssertionError(f"{name} is read again")

    folder = tmp_path / "step_00000000"
    with mock.patch.object(checkpoint_write, "write_contents", full_disk), pytest.raises(CheckpointError):
        write(folder, SPLITTABLE)
    write(folder, SPLITTABLE, source=source)
    assert damages(folder, full=True) == [] and not (folder / JOURNAL).exists()


def test_anothers_unfinished_work_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000000"
    interrupted(folder, after=12, identity="import of x")
    with pytest.raises(CheckpointError, match=r"left unfinished by another run: import of x; remove it"):
        write(folder, SPLITTABLE, "import of y")
    first = json.loads((writing_folder(folder) / JOURNAL).read_text().split("\n")[1])["file"]
    (writing_folder(folder) / first).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not as an interrupted run left it"):
        write(folder, SPLITTABLE, "import of x")


def test_a_whole_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "step_00000000", SPLITTABLE)
    with pytest.raises(CheckpointError, match="exists already and is not replaced"):
        write(tmp_path / "step_00000000", SPLITTABLE)


def test_a_checkpoint_of_another_shape_is_named(tmp_path: Path) -> None:
    write(tmp_path / "step_00000000", SPLITTABLE)
    other = shape_of("M-*M-", mamba_groups=4, mamba_heads=8, attention_heads=8, kv_heads=4, vocab=64, hidden=32)
    with pytest.raises(CheckpointError, match=r"embedding.word_embeddings.weight is \(64, 24\), expected \(64, 32\)"):
        StoredTensors(tmp_path / "step_00000000", other)


def test_what_was_streamed_has_a_manifest_like_any_other(tmp_path: Path) -> None:
    """Also where a killed run wrote some of the files: their checksums are in the journal, they are not read again."""
    folder = tmp_path / "step_00000000"
    interrupted(folder, after=12)
    journal = (writing_folder(folder) / JOURNAL).read_text().splitlines()
    first = json.loads(journal[1])
    content = (writing_folder(folder) / first["file"]).read_bytes()
    assert first["sha256"] == hashlib.sha256(content).hexdigest()
    write(folder, SPLITTABLE)
    assert damages(folder, full=True) == [] and resolve_checkpoint(folder, full=True) == folder
    changed = bytes([content[0] ^ 1]) + content[1:]
    (folder / first["file"]).write_bytes(changed)
    assert damages(folder, full=True)[0].startswith(f"{first['file']} has checksum")
    (folder / first["file"]).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"is not whole: {first['file']} has .* bytes, the manifest says"):
        StoredTensors(folder, SPLITTABLE)


def test_a_disk_that_fills_up_keeps_what_is_finished(small_disk: Path) -> None:
    """The same command goes on from there once there is space."""
    folder = small_disk / "step_00000000"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 150_000))
    with pytest.raises(CheckpointError, match=r"not written: .*No space left on device.*free space there.*stays in"):
        write(folder, SPLITTABLE)
    finished = len((writing_folder(folder) / JOURNAL).read_text().splitlines()) - 1
    assert finished >= 1 and not folder.exists()
    filler.unlink()
    expected = write(folder, SPLITTABLE)
    stored = StoredTensors(folder, SPLITTABLE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
