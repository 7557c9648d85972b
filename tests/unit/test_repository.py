"""What is committed works on any machine: no paths or hosts of the one it was written on, nothing heavy."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_BYTES = 500_000
NUM_PITFALLS = 27
REGISTRY_HOST = re.compile(
    r"\b[\w.-]*(?:pypi|pythonhosted|npmjs|debian|anaconda|crates|golang)[\w-]*\.(?:org|com|net|io)\b"
)
MACHINE_PATH = re.compile(r"(?<![\w.~$})/-])/(?:farm|home|root|tmp|Users|work)/[\w.]")


@pytest.fixture(scope="module")
def tracked_files() -> list[Path]:
    """List the files that git tracks and that are there."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run([git, "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip(f"git cannot list this checkout: {listing.stderr.strip()}")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    """List `file:line: text` for each line of the text files that matches."""
    found = []
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="ignore")
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def test_no_registry_hosts(tracked_files: list[Path]) -> None:
    assert lines_matching(REGISTRY_HOST, tracked_files) == []


def test_no_machine_paths(tracked_files: list[Path]) -> None:
    assert lines_matching(MACHINE_PATH, tracked_files) == []


def test_patterns_find_what_they_look_for() -> None:
    assert REGISTRY_HOST.search("index = https://files." + "pythonhosted" + ".org/simple")
    assert MACHINE_PATH.search('path = "' + "/".join(["", "home", "me", "model"]) + '"')
    assert not MACHINE_PATH.search("see runs/home/me and https://example.com/work/me")


def test_no_large_files(tracked_files: list[Path]) -> None:
    assert [str(file) for file in tracked_files if file.stat().st_size > MAX_BYTES] == []


def test_pinned_versions_are_plain() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9._-]+==[\w.]+", pin)] == []


def test_names_of_guard_tests_bear_a_row_of_the_list() -> None:
    """A test that guards against a known mistake says which: `test_pitfall_12_...`, `test_pitfalls_12_13_...`."""
    wrong = []
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and re.match("test_.*pitfall", node.name):
                rows = re.search(r"pitfalls?((?:_\d+)+)(?:_|$)", node.name)
                if rows is None or not all(1 <= int(row) <= NUM_PITFALLS for row in rows[1].split("_")[1:]):
                    wrong.append(f"{file.name}: {node.name}")
    assert wrong == []
