"""What is written aside: whole or not there, whatever stood at the target; and what a full disk is asked."""

import errno
from pathlib import Path

import pytest

from elastic.world.files import (
    DiskSpaceError,
    check_free_space,
    first_few,
    nearest_existing,
    written_aside,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(target: Path, text: str, *, replace: bool = True) -> None:
    with written_aside(target, replace=replace) as aside:
        aside.mkdir()
        (aside / "inside").write_text(text)


def test_files_and_folders_are_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with written_aside(tmp_path / "below" / "file") as aside:
            aside.write_text(text)
        write_folder(tmp_path / "folder", text)
        (tmp_path / "folder" / f"beside the {text}").touch()
    assert (tmp_path / "below" / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "second"
    assert names_in(tmp_path) == ["below", "folder"] and names_in(tmp_path / "below") == ["file"]
    assert names_in(tmp_path / "folder") == ["beside the second", "inside"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "folder", "first")
    (tmp_path / "file").write_text("first")
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / kind) as aside:
        aside.mkdir() if kind == "folder" else aside.write_text("half")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "first"


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "folder", "first")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write_folder(tmp_path / "folder", "second")
    assert names_in(tmp_path) == ["folder"] and (tmp_path / "folder" / "inside").read_text() == "first"


def test_what_must_not_be_replaced_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", "filled", replace=False)
    with pytest.raises(OSError) as caught:
        write_folder(tmp_path / "empty", "again", replace=False)
    assert caught.value.errno in (errno.EEXIST, errno.ENOTEMPTY)
    with pytest.raises(FileExistsError), written_aside(tmp_path / "empty" / "inside", replace=False) as aside:
        aside.write_text("again")
    assert (tmp_path / "empty" / "inside").read_text() == "filled" and names_in(tmp_path) == ["empty"]


def test_a_link_to_another_disk_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "inside").read_text() == "text"


def test_the_nearest_folder_is_asked_for_its_space(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(Path("not here") / "at all") == Path()
    check_free_space(tmp_path / "a" / "b", 1, "a test")
    with pytest.raises(DiskSpaceError, match=rf"not enough disk for a test in .*the disk of {tmp_path}; free "):
        check_free_space(tmp_path / "a" / "b", 1 << 60, "a test")


@pytest.mark.parametrize(("count", "text"), [(0, ""), (4, "0, 1, 2, 3"), (6, "0, 1, 2, 3, and 2 more")])
def test_a_long_list_is_counted(count: int, text: str) -> None:
    assert ", ".join(first_few([str(number) for number in range(count)])) == text
