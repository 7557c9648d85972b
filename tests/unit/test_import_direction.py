"""Rooms import only the rooms below them, so that each can be read and tested without those above."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("space", "modules", "router", "compress", "distill", "generate", "train", "plan")
RECIPES_ONLY = {"hydra", "nemo", "omegaconf", "lightning", "pytorch_lightning", "recipes", "tests"}
MAY_IMPORT_ROOMS = {
    "space": set[str](),
    "modules": {"space"},
    "router": {"space"},
    "compress": {"space", "modules"},
    "distill": {"modules"},
    "generate": {"space", "modules"},
    "train": set(ROOMS) - {"plan"},
    "plan": {"space", "modules", "train"},
}
MAY_IMPORT_MEGATRON = {"modules", "train", "plan"}


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
    forbidden = {f"elastic.{other}" for other in ROOMS if other != room and other not in MAY_IMPORT_ROOMS[room]}
    forbidden |= RECIPES_ONLY | (set() if room in MAY_IMPORT_MEGATRON else {"megatron"})
    for file in (ROOT / "elastic" / room).rglob("*.py"):
        for name in imported_names(file):
            prefixes = {name.split(".")[0], ".".join(name.split(".")[:2])}
            assert not prefixes & forbidden, f"{file.relative_to(ROOT)} imports {name}"
            allowed_in_space = sys.stdlib_module_names | {"torch", "elastic"}
            assert room != "space" or name.split(".")[0] in allowed_in_space, f"{file.name} imports {name}"


def test_the_rooms_are_the_folders() -> None:
    assert {file.parent.name for file in (ROOT / "elastic").glob("*/__init__.py")} == set(ROOMS)
