"""What is committed works on any machine: no paths or hosts of the one it was written on, nothing heavy."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_BYTES = 500_000
NUM_PITFALLS = 27
PITFALLS_PAGE = ROOT / "docs" / "pitfalls.md"
REGISTRY_HOST = re.compile(
    r"\b[\w.-]*(?:pypi|pythonhosted|npmjs|debian|anaconda|crates|golang)[\w-]*\.(?:org|com|net|io)\b"
)
# Papers of the people who planned it, which a reader of the repository does not have.
OUTSIDE = re.compile(
    r"\b(?:FACTS|PITFALLS|PLATFORM|DESIGN|STYLE)(?:\.md)?\b(?! =)|(?<![\w/])shared/(?:design|probes|tools)"
)
PAGE = re.compile(r"docs/(\w+\.md)(?:,? (\d+(?:\.\d+)?)\b)?")
LINK = re.compile(r"\]\(([\w/]+\.md)\)(?: (\d+(?:\.\d+)?)\b)?")
PATH = re.compile(r"(?<![\w/{}.*-])((?:conf|elastic|launch|recipes|tests)/[\w./]*\w)(?:::(\w+))?(?![\w/*{<])")
FILE_NAME = re.compile(r"`(\w+\.(?:py|yaml|sh))`")
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


def test_nothing_points_outside_the_repository(tracked_files: list[Path]) -> None:
    others = [file for file in tracked_files if file != Path(__file__)]
    assert lines_matching(OUTSIDE, others) == []
    assert all(OUTSIDE.search(text) for text in ("see FACTS 1.1", "in shared/design")) and not OUTSIDE.search(
        "shared disk"
    )


def sections(page: Path) -> set[str]:
    """List the numbers of the headings of a page, and of the rows of its tables."""
    return set(re.findall(r"^(?:#+|\|) (\d+(?:\.\d+)?)\b", page.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_page_and_section_that_is_named_exists(tracked_files: list[Path]) -> None:
    wrong = []
    for file in tracked_files:
        text = file.read_bytes().decode("utf-8", errors="ignore") if file != Path(__file__) else ""
        named = [(ROOT / "docs" / page, number) for page, number in PAGE.findall(text)]
        if file.suffix == ".md":
            named += [(file.parent / page, number) for page, number in LINK.findall(text)]
        for page, number in named:
            if not page.is_file() or (number and number not in sections(page)):
                wrong.append(f"{file.relative_to(ROOT)}: {page.name} {number}".strip())
    assert wrong == []


def test_every_path_and_test_that_the_docs_name_exists(tracked_files: list[Path]) -> None:
    """And every path of a test that a docstring or a comment names."""
    wrong, names = [], {file.name for file in tracked_files}
    for file in tracked_files:
        text = file.read_bytes().decode("utf-8", errors="ignore") if file != Path(__file__) else ""
        is_page = file.suffix == ".md"
        for path, test in PATH.findall(text):
            target = ROOT / path
            if not (is_page or (path.startswith("tests/") and path.endswith(".py"))):
                continue
            if not target.exists() or (test and f"def {test}(" not in target.read_text(encoding="utf-8")):
                wrong.append(f"{file.relative_to(ROOT)}: {path} {test}".strip())
        wrong += [f"{file.name}: {name}" for name in FILE_NAME.findall(text) if is_page and name not in names]
    assert wrong == []


def test_every_known_mistake_has_its_guards_in_the_list() -> None:
    listed = {
        row: set(re.findall(r"::(\w+)`", cells))
        for row, cells in re.findall(r"^\| (\d+) \|(.*)\|$", PITFALLS_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    }
    found: dict[str, set[str]] = {str(row): set() for row in range(1, NUM_PITFALLS + 1)}
    for name, rows in guard_tests():
        for row in rows:
            found[row].add(name)
    assert listed == found and all(found.values())


def guard_tests() -> list[tuple[str, list[str]]]:
    """List the tests that bear rows of the list of mistakes, with those rows."""
    named = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w*pitfall\w*)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            rows = re.search(r"pitfalls?((?:_\d+)+)(?:_|$)", name)
            named.append((name, [str(int(row)) for row in rows[1].split("_")[1:]] if rows else []))
    return named


def test_no_large_files(tracked_files: list[Path]) -> None:
    assert [str(file) for file in tracked_files if file.stat().st_size > MAX_BYTES] == []


def test_pinned_versions_are_plain() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9._-]+==[\w.]+", pin)] == []


def test_names_of_guard_tests_bear_a_row_of_the_list() -> None:
    """A test that guards against a known mistake says which: `test_pitfall_12_...`, `test_pitfalls_12_13_...`."""
    rows_of = guard_tests()
    assert [name for name, rows in rows_of if not rows or not all(1 <= int(row) <= NUM_PITFALLS for row in rows)] == []
