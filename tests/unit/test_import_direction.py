"""Rooms import only the rooms below them, so that each can be read and tested without those above."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up: a room may import rooms above it in this list, never one below; so there is no circle.
ROOMS = (
    "space",
    "kernels",
    "world",
    "model",
    "router",
    "distill",
    "rank",
    "hf",
    "engines",
    "config",
    "data",
    "corpus",
    "blend",
    "search",
    "checkpoint",
    "run",
    "train",
    "generate",
    "report",
    "tasks",
    "verbs",
    "preflight",
    "plan",
)
NARROWER = {  # rooms that import less than all below them: each can be read with these alone
    "router": {"space"},
    "kernels": set[str](),
    "world": set[str](),
    "distill": {"kernels"},
    "rank": {"space", "model"},
    "hf": {"space", "model", "rank"},
    "engines": {"hf"},
    "config": {"space", "router"},
    "corpus": {"space", "world", "config", "data"},
    "search": {"space", "router", "config"},
    "generate": {"space", "model"},
    "report": {"space"},
    "tasks": {"space", "model", "hf", "config", "generate"},
}
FOR_ALL = "elastic.world.files"  # it imports no room itself
RECIPES_ONLY = {"hydra", "nemo", "omegaconf", "lightning", "pytorch_lightning", "recipes", "tests"}
MAY_IMPORT_MEGATRON = {"model", "world", "data", "corpus", "checkpoint", "train", "verbs", "plan"}
MAX_SHARE_OF_LINES = 0.15
MAX_LINES_OF_FILE = 300


def may_import(room: str) -> set[str]:
    """List the rooms that a room may import."""
    return NARROWER.get(room, set(ROOMS[: ROOMS.index(room)]))


def imported_names(file: Path) -> set[str]:
    """List the modules that a file imports, wherever the statement stands, as absolute dotted names."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join((*package, node.module or "")).strip(".")
            names |= {module} if module != "elastic" else {f"elastic.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_is_below_it(room: str) -> None:
    forbidden = {f"elastic.{other}" for other in ROOMS if other != room and other not in may_import(room)}
    forbidden |= RECIPES_ONLY | (set() if room in MAY_IMPORT_MEGATRON else {"megatron"})
    for file in (ROOT / "elastic" / room).rglob("*.py"):
        for name in imported_names(file) - {FOR_ALL}:
            prefixes = {name.split(".")[0], ".".join(name.split(".")[:2])}
            assert not prefixes & forbidden, f"{file.relative_to(ROOT)} imports {name}"
            allowed_in_space = sys.stdlib_module_names | {"torch", "elastic"}
            assert room != "space" or name.split(".")[0] in allowed_in_space, f"{file.name} imports {name}"


def test_what_every_room_may_import_imports_no_room() -> None:
    file = ROOT / FOR_ALL.replace(".", "/")
    assert {name.split(".")[0] for name in imported_names(file.with_suffix(".py"))} <= sys.stdlib_module_names


def test_the_rooms_are_the_folders() -> None:
    assert {file.parent.name for file in (ROOT / "elastic").glob("*/__init__.py")} == set(ROOMS)


def lines_of(folder: Path) -> dict[str, int]:
    """Count the lines of every Python file under a folder."""
    files = sorted(folder.rglob("*.py"))
    return {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}


def lines_per_room() -> dict[str, int]:
    """Count the lines of every room, biggest first."""
    counts = {room: sum(lines_of(ROOT / "elastic" / room).values()) for room in ROOMS}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def test_no_room_outgrows_the_house() -> None:
    lines = lines_per_room()
    assert {room: count for room, count in lines.items() if count > MAX_SHARE_OF_LINES * sum(lines.values())} == {}


def test_no_file_outgrows_a_reader() -> None:
    lines = lines_of(ROOT / "elastic") | lines_of(ROOT / "recipes") | lines_of(ROOT / "tests")
    assert {file: count for file, count in lines.items() if count > MAX_LINES_OF_FILE} == {}


if __name__ == "__main__":  # python tests/unit/test_import_direction.py
    TOTAL = sum(lines_of(ROOT / "elastic").values())
    for ROOM, LINES in lines_per_room().items():
        print(f"{ROOM:12} {LINES:6,} {LINES / TOTAL:6.1%}")
    print(f"{'elastic':12} {TOTAL:6,}")
