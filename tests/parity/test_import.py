"""The verb import_hf on stock folders: gone on with after a stop, damage named; its logits: tests/distributed."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import CheckpointError
from elastic.hf.tensor_files import TensorFolder
from elastic.run.folder import RunFolderError
from tests.parity.hf_models import SHAPES
from tests.parity.import_extract import extracted, imported, stock_folder, weights


def test_an_import_is_gone_on_with_and_never_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["groups 8, twelve layers"]
    stock_folder(tmp_path / "stock", shape, "fp32")
    read, count = TensorFolder.__getitem__, 0

    def killed(self: TensorFolder, name: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 60:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(TensorFolder, "__getitem__", killed)
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path, tmp_path / "stock")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        resolve_checkpoint(tmp_path / "imported" / "v")
    before = count
    run = imported(tmp_path, tmp_path / "stock")
    assert count - before < len(weights(tmp_path / "stock")), "the finished layers were read again"
    with pytest.raises(RunFolderError, match="holds a whole checkpoint already"):
        imported(tmp_path, tmp_path / "stock")
    monkeypatch.setattr(TensorFolder, "__getitem__", read)
    back = extracted(tmp_path, run) / "parent"
    original = weights(tmp_path / "stock")
    assert all(torch.equal(original[key], tensor) for key, tensor in weights(back).items())


def test_an_import_is_not_gone_on_with_from_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "fp32")
    (tmp_path / "stock" / "adapter.json").symlink_to("nowhere")  # nobody reads it
    template = tmp_path / "stock" / "chat_template.jinja"
    template.write_text("{{ messages }}")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Record, "write", killed)  # when the template has been copied already
        imported(tmp_path, tmp_path / "stock")
    template.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"left unfinished by another run: .*chat_template\.jinja"):
        imported(tmp_path, tmp_path / "stock")
    (tmp_path / "elsewhere").rename(template)
    checkpoint = resolve_checkpoint(imported(tmp_path, tmp_path / "stock"))
    assert (checkpoint / "hugging_face" / template.name).read_text() == "{{ messages }}"


def test_a_malformed_folder_leaves_nothing(tmp_path: Path) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "fp32")
    shard = sorted((tmp_path / "stock").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=shard.name):
        imported(tmp_path, tmp_path / "stock")
    assert not (tmp_path / "imported").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "fp32")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="not enough disk for the checkpoint"):
        imported(tmp_path, tmp_path / "stock")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_tensor_is_named_and_the_mended_folder_imported(value: float, tmp_path: Path) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "bf16")
    shard = sorted((tmp_path / "stock").glob("model-*.safetensors"))[-1]
    good, tensors = shard.read_bytes(), load_file(shard)
    name = next(name for name in tensors if name.endswith("up_proj.weight") or name.endswith("norm.weight"))
    tensors[name].view(-1)[1] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    named = name.replace("model.", "backbone.", 1)
    with pytest.raises(ValueError, match=rf"{named} is damaged: 1 of its \d+ values are NaN or infinite"):
        imported(tmp_path, tmp_path / "stock")
    shard.write_bytes(good)
    assert resolve_checkpoint(imported(tmp_path, tmp_path / "stock")).is_dir()
