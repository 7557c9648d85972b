"""A disk that fills up or may not be written: one clear error, nothing left that looks whole, the old folder intact."""

import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic.corpus.prepare import prepare
from elastic.data.manifest import DataError
from tests.disks import mounted_disk
from tests.unit.data.preparing import config, contents, texts, write_jsonl

NOBODY = 65534
REMEDY = "free the space or choose another place"


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a folder that another user may pass through, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def in_child(action: Callable[[], object], restrict: Callable[[], object]) -> str:
    """Run `action` under a restriction of its own process; returns the message of its DataError, "" without one."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        message = b"not even started"
        try:
            restrict()
            action()
            message = b""
        except DataError as error:
            message = str(error).encode()
        except BaseException as error:
            message = f"escaped: {error!r}".encode()
        finally:
            os.write(writing, message)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        message = stream.read().decode()
    os.waitpid(process, 0)
    return message


def as_nobody() -> None:
    """Become a user without rights, where this one has all."""
    if os.geteuid() == 0:
        os.setuid(NOBODY)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the child forks only to be restricted
@pytest.mark.parametrize(
    ("limited", "documents"),
    [("tokenizer.json", texts()[:20]), ("train.bin", texts() * 20), ("train.idx", ["7"] * 5000)],
)
def test_file_that_may_not_grow_is_reported_and_nothing_is_left(
    tmp_path: Path, limited: str, documents: list[str]
) -> None:
    source = tmp_path / "source.jsonl"
    write_jsonl(source, documents)
    settings = {"skip_duplicates": False, "validation_ratio": 0}
    prepare(config(source, tmp_path / "whole", **settings))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    size = sizes[limited]
    assert size == max(sizes.values())  # so that the limit stops this file and no other
    message = in_child(
        lambda: prepare(config(source, tmp_path / "data", **settings)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
    )
    assert message == f"output_dir = {tmp_path / 'data'}: cannot be written (File too large); {REMEDY}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.jsonl", "whole"]


@pytest.fixture
def full_soon(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 128 KiB; skips where that is not allowed."""
    with mounted_disk(tmp_path / "disk", "128k") as disk:
        yield disk


def test_full_disk_is_reported_and_the_old_folder_stays(tmp_path: Path, full_soon: Path) -> None:
    source = tmp_path / "source.jsonl"
    write_jsonl(source, texts()[:20])
    prepare(config(source, full_soon / "data"))
    before = contents(full_soon / "data")
    write_jsonl(source, texts() * 30)
    larger = config(source, full_soon / "data", skip_duplicates=False, overwrite=True)
    with pytest.raises(DataError, match=rf"output_dir = .*No space left on device.*{REMEDY}"):
        prepare(larger)
    assert contents(full_soon / "data") == before
    assert [path.name for path in full_soon.iterdir()] == ["data"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_place_without_permission_is_reported(place: Path) -> None:
    write_jsonl(place / "source.jsonl", texts())
    (place / "locked").mkdir(mode=0o555)
    message = in_child(lambda: prepare(config(place / "source.jsonl", place / "locked" / "data")), as_nobody)
    assert message == f"output_dir = {place / 'locked' / 'data'}: cannot be written (Permission denied); {REMEDY}"
    assert list((place / "locked").iterdir()) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_source_without_permission_is_counted(place: Path) -> None:
    source = place / "source"
    source.mkdir(mode=0o755)
    (source / "locked").mkdir()
    (source / "locked" / "a.py").write_text("a")
    (source / "secret.py").write_text("b")
    for path in (source / "locked", source / "secret.py"):
        path.chmod(0)
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    settings = config(source, place / "open" / "data", document_format="text")
    message = in_child(lambda: prepare(settings), as_nobody)
    assert message == f"data: no usable document in {source}; skipped: 2 unreadable (first {source / 'locked'})"


@pytest.mark.parametrize("output", ["file/data", "file"])
def test_place_below_or_at_a_file_is_refused(tmp_path: Path, output: str) -> None:
    write_jsonl(tmp_path / "source.jsonl", texts())
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DataError, match=r"output_dir = .*file"):
        prepare(config(tmp_path / "source.jsonl", tmp_path / output, overwrite=True))
    assert (tmp_path / "file").read_text() == "precious"
