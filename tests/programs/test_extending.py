"""docs/extending.md is a recipe that works: its edits, made in a copy of the repository, do what it says."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"


def edits() -> Iterator[tuple[str, str, str]]:
    """Yield (file, lines before, lines after) of every gap-free piece of the page's blocks, in order."""
    file = ""
    for text, block in re.findall(r"(.*?)```diff\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        file = re.findall(r"^\*\*([\w/.]+)\*\*", text, flags=re.MULTILINE)[-1]
        for piece in block.split("@@\n"):
            lines = piece.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            yield file, before, "".join(line[1:] for line in lines if line[0] in " +")


def test_an_axis_a_layer_kind_and_a_metric_are_added_as_the_page_says(tmp_path: Path) -> None:
    """All three examples at once, in one copy: what they claim is checked in a process of its own (extended.py)."""
    for folder in ("elastic", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)  # with what is compiled already
    for file, before, after in edits():
        path = tmp_path / file
        content = path.read_text()
        assert content.count(before) == 1, f"{file} holds these lines {content.count(before)} times:\n{before}"
        path.write_text(content.replace(before, after))
    command = [sys.executable, "-m", "tests.programs.extended"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
