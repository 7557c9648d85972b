"""No file that is read can run code: a pickle in every place is refused, not executed, with the reason.

The forger knows the format: the manifest is made to fit. That unpickling really would run the code is shown with
Megatron-Core's own reader.
"""

import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from elastic.checkpoint.contents import CONTENTS_FILE, CheckpointError, write_contents
from elastic.checkpoint.find import list_checkpoints, resolve_checkpoint
from elastic.checkpoint.read import LEGACY_COMMON_FILE, METADATA_FILE, StoredTensors, refuse_code
from elastic.checkpoint.record import RECORD_FILE, Record, RecordError
from elastic.checkpoint.state import ROUTER_FILE, STATE_FILE, Trainable, load_checkpoint, load_router
from elastic.checkpoint.write import COMMON
from elastic.data.manifest import DataError
from elastic.data.tokenizer import load_tokenizer
from elastic.data.tokens import TokenStream
from elastic.hf.export_settings import EXPORT_SETTINGS_FOLDER, ExportSettingsError, read_export_settings
from elastic.model.model import build_model
from elastic.world.groups import Layout
from tests.parity.model_factory import one_process


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def executed(tmp_path: Path) -> Iterator[Path]:
    """Name a file that a malicious pickle would create; it must not be there in the end."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists(), "code of a file was run"


@pytest.fixture
def checkpoint(start: Path, tmp_path: Path) -> Path:
    """Copy the permuted parent's checkpoint."""
    return Path(shutil.copytree(list_checkpoints(start / "run" / "permuted")[0], tmp_path / "step_00000000"))


def seal(folder: Path) -> None:
    """Make the manifest fit what lies in the folder."""
    (folder / CONTENTS_FILE).unlink()
    write_contents(folder, {})


def forge_common_state(folder: Path, payload: bytes) -> None:
    """Append an object to a tensor file and let the index point to it."""
    metadata: Metadata = pickle.loads((folder / METADATA_FILE).read_bytes())
    stored = metadata.storage_data[MetadataIndex(COMMON.unique_key)]
    with (folder / stored.relative_path).open("ab") as file:
        stored.offset, stored.length = file.tell(), len(payload)
        file.write(payload)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    seal(folder)


def torch_saved(content: object, **options: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def load_model(folder: Path) -> None:
    """Load as every verb does that builds a model."""
    record = Record.read(folder)
    with one_process():
        load_checkpoint(folder, Trainable(build_model(record.space(), Layout())))


def test_this_attack_works_on_an_unguarded_reader(checkpoint: Path, tmp_path: Path) -> None:
    forge_common_state(checkpoint, torch_saved([{}, Malicious(tmp_path / "run by Megatron-Core")]))
    dist_checkpointing.load_common_state_dict(str(checkpoint))
    assert (tmp_path / "run by Megatron-Core").exists(), "if this fails, Megatron-Core has become safe by itself"


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_an_object_beside_the_tensors(checkpoint: Path, executed: Path, options: dict[str, bool]) -> None:
    forge_common_state(checkpoint, torch_saved([{}, Malicious(executed)], **options))
    with pytest.raises(CheckpointError, match="the object common_state/shard_0_1 is damaged or asks for code"):
        load_model(checkpoint)


def test_a_bare_pickle_beside_the_tensors(checkpoint: Path, executed: Path) -> None:
    forge_common_state(checkpoint, pickle.dumps(Malicious(executed)))
    with pytest.raises(CheckpointError, match="the object common_state/shard_0_1 is damaged or asks for code"):
        load_model(checkpoint)


@pytest.mark.parametrize("read", [load_model, lambda folder: StoredTensors(folder, Record.read(folder).shape)])
def test_the_index(checkpoint: Path, executed: Path, read: Callable[[Path], object]) -> None:
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(Malicious(executed)))
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"damaged or unsafe.* asks for pathlib.*which no index needs"):
        read(checkpoint)


@pytest.mark.parametrize("content", [3, None, Metadata({}, None, None)], ids=["number", "None", "empty"])
def test_an_index_that_is_something_else(checkpoint: Path, content: object) -> None:
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(content))
    seal(checkpoint)
    with pytest.raises(CheckpointError, match="not a whole index"):
        load_model(checkpoint)


@pytest.mark.parametrize("place", ["../outside.distcp", "/etc/hostname"])
def test_an_index_that_points_out_of_the_folder(checkpoint: Path, place: str) -> None:
    metadata = pickle.loads((checkpoint / METADATA_FILE).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = place
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    with pytest.raises(CheckpointError, match="points out of the folder"):
        load_model(checkpoint)


def test_the_file_of_older_versions_beside_the_tensors(checkpoint: Path, executed: Path) -> None:
    (checkpoint / LEGACY_COMMON_FILE).write_bytes(torch_saved({"a": Malicious(executed)}))
    with pytest.raises(CheckpointError, match=r"common\.pt is not in manifest\.json"):
        resolve_checkpoint(checkpoint)
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"holds common\.pt, a pickle that can run code; it is not loaded"):
        load_model(checkpoint)


def test_a_tensor(checkpoint: Path, executed: Path) -> None:
    metadata = pickle.loads((checkpoint / METADATA_FILE).read_bytes())
    index = next(index for index in metadata.storage_data if "norm" in index.fqn)
    payload = torch_saved(Malicious(executed))
    with (checkpoint / metadata.storage_data[index].relative_path).open("ab") as file:
        metadata.storage_data[index].offset, metadata.storage_data[index].length = file.tell(), len(payload)
        file.write(payload)
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    refuse_code(checkpoint)
    with pytest.raises(CheckpointError, match="does not fit the model, or is damaged"):
        load_model(checkpoint)
    stored = StoredTensors(checkpoint, Record.read(checkpoint).shape)
    with pytest.raises(CheckpointError, match=r"cannot be read, the file is truncated or damaged"):
        stored[index.fqn]


@pytest.mark.parametrize(
    ("name", "read", "error", "said"),
    [
        (RECORD_FILE, Record.read, RecordError, "is damaged or of another version"),
        ("metadata.json", load_model, CheckpointError, "does not fit the model, or is damaged"),
        (STATE_FILE, load_model, CheckpointError, "is damaged"),
        (ROUTER_FILE, lambda folder: load_router(folder, torch.nn.Linear(1, 1)), CheckpointError, "no safetensors"),
        (f"{EXPORT_SETTINGS_FOLDER}/settings.json", read_export_settings, ExportSettingsError, "settings.json"),
    ],
    ids=["record", "metadata.json", "state", "router", "settings"],
)
def test_files_beside_the_tensors(
    checkpoint: Path,
    executed: Path,
    name: str,
    read: Callable[[Path], object],
    error: type[ValueError],
    said: str,
) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    for payload in (pickle.dumps(Malicious(executed)), torch_saved(Malicious(executed)), b"", b"[[]]"):
        (checkpoint / name).write_bytes(payload)
        seal(checkpoint)
        with pytest.raises(error, match=said):
            read(checkpoint)


@pytest.mark.parametrize("name", ["data.json", "train.bin", "train.idx", "tokenizer.json"])
def test_prepared_data(start: Path, tmp_path: Path, executed: Path, name: str) -> None:
    folder = Path(shutil.copytree(start / "data", tmp_path / "data"))
    (folder / name).write_bytes(pickle.dumps(Malicious(executed)))
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_tokenizer(folder) if name == "tokenizer.json" else TokenStream(folder / "train")
