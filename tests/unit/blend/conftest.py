"""Prepared folders and pairs of another tool, made once for all tests of this room."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from elastic.corpus.prepare import PrepareConfig, prepare


def write_pair(prefix: Path, documents: list[np.ndarray], dtype: type = np.int32) -> None:
    """Write a .bin and an .idx as other tools do."""
    writer = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        writer.add_document(document, [len(document)])
    writer.finalize(f"{prefix}.idx")


def poked(at: int, value: int) -> Callable[[Path], None]:
    """Return what sets a byte of an index."""
    return lambda pair: np.memmap(pair.with_suffix(".idx"), mode="r+").__setitem__(at, value)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare `code` and `text` with one tokenizer and `other` with another, and write pairs: a/b in `foreign`."""
    folder = tmp_path_factory.mktemp("blend")
    for name, count in (("code", 500), ("text", 250), ("other", 100), ("tiny", 1)):
        lines = [f"{name} {number} is {number * number}, or {'more ' * (number % 5)}" for number in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
        given = {"tokenizer_path": str(folder / "code")} if name in ("text", "tiny") else {"vocab_size": 300}
        held_out = dict(validation_ratio=0.0 if name == "tiny" else 0.3, test_ratio=0.2 if name == "text" else 0.0)
        settings = dict(document_format="lines", **held_out, **given)
        prepare(PrepareConfig(output_dir=str(folder / name), paths=[str(folder / f"{name}.txt")], **settings))
    (folder / "foreign").mkdir()
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 290, size).astype(np.int32) for size in draw.integers(3, 90, 60)]
    write_pair(folder / "foreign" / "a", documents[:25])
    write_pair(folder / "foreign" / "b", documents[25:], np.uint16)
    write_pair(folder / "held", documents[:10])
    write_pair(folder / "wide", [np.array([5, 70000, 3] * 9, np.int32)])
    return folder
