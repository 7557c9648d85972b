"""Indexed files that are not what they were: refused with the remedy when a run opens them; nothing is unpickled."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from elastic.config.sections import DataConfig
from elastic.config.verbs import PretrainConfig
from elastic.corpus.prepare import PrepareConfig, prepare
from elastic.data.manifest import REMEDY, DataError
from elastic.data.tokens import TokenStream
from elastic.verbs.training import run_training

ROOT = Path(__file__).parents[3]
NUM_LINES = 300
INDEX_HEADER_BYTES = 34  # magic (9), version (8), dtype code (1), then how many sequences and document boundaries
INDEX_COUNTS = struct.Struct("<QQ")


def prepare_lines(folder: Path, words: str) -> Path:
    """Prepare lines of the same lengths whatever the five-letter word is, one token a byte."""
    folder.mkdir(exist_ok=True)
    lines = [f"line {number:03} says {words} {'again ' * (number % 7)}" for number in range(NUM_LINES)]
    (folder / "lines.txt").write_text("\n".join(lines))
    settings: dict[str, Any] = {"document_format": "lines", "vocab_size": 257, "validation_ratio": 0.3}
    prepare(PrepareConfig(output_dir=str(folder / "prepared"), paths=[str(folder / "lines.txt")], **settings))
    return folder / "prepared"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_lines(tmp_path_factory.mktemp("data"), "apple")


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def write_at(path: Path, offset: int, content: bytes) -> None:
    """Overwrite some bytes of a file."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def entry(folder: Path, what: str, index: int) -> int:
    """Return the byte offset of an entry of train.idx: a length, an offset, or a document boundary."""
    sequences, boundaries = INDEX_COUNTS.unpack_from((folder / "train.idx").read_bytes(), INDEX_HEADER_BYTES - 16)
    start, width, count = {
        "length": (0, 4, sequences),
        "offset": (4 * sequences, 8, sequences),
        "boundary": (12 * sequences, 8, boundaries),
    }[what]
    return INDEX_HEADER_BYTES + start + width * (index % count)


def cut_data(folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])


def cut_index(folder: Path) -> None:
    path = folder / "train.idx"
    path.write_bytes(path.read_bytes()[:20])


def swap_splits(folder: Path) -> None:
    for suffix in ("bin", "idx"):
        (folder / f"train.{suffix}").rename(folder / "aside")
        (folder / f"validation.{suffix}").rename(folder / f"train.{suffix}")
        (folder / "aside").rename(folder / f"validation.{suffix}")


def swap_equal_size(folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[::-1])


def remove_index(folder: Path) -> None:
    (folder / "train.idx").unlink()


def wrong_dtype(folder: Path) -> None:
    write_at(folder / "train.idx", 17, b"\x04")


def float_dtype(folder: Path) -> None:
    write_at(folder / "train.idx", 17, b"\x06")


def offset_beyond_data(folder: Path) -> None:
    write_at(folder / "train.idx", entry(folder, "offset", 3), struct.pack("<q", 1 << 40))


def last_offset_beyond_data(folder: Path) -> None:
    write_at(folder / "train.idx", entry(folder, "offset", -1), struct.pack("<q", 1 << 40))


def negative_length(folder: Path) -> None:
    write_at(folder / "train.idx", entry(folder, "length", 3), struct.pack("<i", -5))


def documents_beyond_sequences(folder: Path) -> None:
    write_at(folder / "train.idx", entry(folder, "boundary", -1), struct.pack("<q", 10**6))


def falling_documents(folder: Path) -> None:
    write_at(folder / "train.idx", entry(folder, "boundary", 2), struct.pack("<q", 0))


def remove_data(folder: Path) -> None:
    (folder / "train.bin").unlink()


def empty_both(folder: Path) -> None:
    for suffix in ("bin", "idx"):
        (folder / f"train.{suffix}").write_bytes(b"")


INDEX_DAMAGE = [
    cut_index,
    remove_index,
    wrong_dtype,
    float_dtype,
    offset_beyond_data,
    last_offset_beyond_data,
    negative_length,
    documents_beyond_sequences,
    falling_documents,
]


@pytest.mark.parametrize(
    "damage", [*INDEX_DAMAGE, cut_data, swap_splits, swap_equal_size, remove_data, empty_both], ids=lambda d: d.__name__
)
def test_truncated_swapped_or_missing_file_is_refused_with_the_remedy(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    TokenStream(copy / "train")
    damage(copy)
    with pytest.raises(DataError, match=rf"train\.(bin|idx) .*{REMEDY}"):
        TokenStream(copy / "train")


def test_data_without_a_manifest_is_refused(copy: Path) -> None:
    (copy / "data.json").unlink()
    with pytest.raises(DataError, match=r"no data\.json"):
        TokenStream(copy / "train")


@pytest.mark.parametrize(
    ("dtype", "message"), [("int32", "tokens, data.json says"), ("object", "no type of token ids")]
)
def test_manifest_that_says_another_type_is_refused(copy: Path, dtype: str, message: str) -> None:
    path = copy / "data.json"
    path.write_text(path.read_text().replace('"dtype": "uint16"', f'"dtype": "{dtype}"'))
    with pytest.raises(DataError, match=rf"train\.bin: .*{message}.*{REMEDY}"):
        TokenStream(copy / "train")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_file_changed_by_a_bit_is_refused(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is missing or is not the one .*{REMEDY}"):
        TokenStream(copy / "train")


def test_a_folder_of_the_earlier_format_is_read(copy: Path) -> None:
    manifest = json.loads((copy / "data.json").read_text())
    manifest["format"] = "elastic-data-2"
    del manifest["tokenizer"]["bos_ids"], manifest["tokenizer"]["files"]
    for split in manifest["splits"].values():
        del split["sources"]
    (copy / "data.json").write_text(json.dumps(manifest))
    stream = TokenStream(copy / "train")
    assert stream.num_tokens == manifest["splits"]["train"]["num_tokens"]


def test_files_of_another_corpus_of_the_same_size_are_refused(copy: Path, tmp_path: Path) -> None:
    other = prepare_lines(tmp_path / "other", "melon")
    # Another text is split elsewhere, so that its tokens are cut to the size of the split they replace.
    size = (copy / "train.bin").stat().st_size
    tokens = b"".join((other / f"{split}.bin").read_bytes() for split in ("train", "validation"))[:size]
    assert len(tokens) == size
    (copy / "train.bin").write_bytes(tokens)
    with pytest.raises(DataError, match=r"train\.bin has the right size and another content; restore it or prepare"):
        TokenStream(copy / "train")


@pytest.mark.parametrize("change", ["other", "gone"])
def test_folder_with_another_tokenizer_is_refused(copy: Path, tmp_path: Path, change: str) -> None:
    path = copy / "tokenizer.json"
    if change == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("<|endoftext|>", "<|endofword|>"))
    with pytest.raises(DataError, match=r"tokenizer\.json is missing or is not the one the tokens were made with"):
        TokenStream(copy / "train")


def test_run_refuses_damaged_data_before_any_process_group(copy: Path, tmp_path: Path) -> None:
    cut_data(copy)
    with pytest.raises(DataError, match=r"train\.bin has [\d,]+ bytes, the manifest says"):
        run_training(PretrainConfig(data=DataConfig(path=str(copy))), Console())
    assert not torch.distributed.is_initialized()


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["train.idx", "train.bin", "data.json", "tokenizer.json"])
@pytest.mark.parametrize("form", ["pickle", "numpy"])
def test_pickle_in_place_of_a_file_is_never_run(copy: Path, tmp_path: Path, name: str, form: str) -> None:
    canary = Canary(tmp_path / "ran")
    with (copy / name).open("wb") as stream:
        if form == "pickle":
            pickle.dump(canary, stream)
        else:
            np.save(stream, np.array([canary], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        TokenStream(copy / "train")
    assert not (tmp_path / "ran").exists()


def test_no_reader_of_data_unpickles() -> None:
    files = sorted((ROOT / "elastic" / "data").glob("*.py"))
    assert len(files) > 5
    for file in files:
        source = file.read_text(encoding="utf-8")
        assert "pickle" not in source and "np.load" not in source and "numpy.load" not in source


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": "elastic-data-2"}', b"\xff\x00", b"[" * 100_000])
def test_manifest_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    (copy / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.json"):
        TokenStream(copy / "train")


def test_unknown_split_names_those_there_are(prepared: Path) -> None:
    with pytest.raises(DataError, match="holds train, validation"):
        TokenStream(prepared / "test")
