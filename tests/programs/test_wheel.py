"""A wheel, not a clone: conf/ is in it, and an installed recipe finds it from any folder."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.programs.test_start import started

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel offline from a copy, so that nothing is left in the clone, and unpack it as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("elastic", "recipes", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    ended = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_every_file_of_conf_is_installed(installed: Path) -> None:
    shipped = {
        path.relative_to(installed / "recipes" / "conf") for path in (installed / "recipes" / "conf").rglob("*.yaml")
    }
    assert shipped == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    modules = {
        path.relative_to(installed) for folder in ("elastic", "recipes") for path in (installed / folder).rglob("*.py")
    }
    assert modules == {
        path.relative_to(ROOT) for folder in ("elastic", "recipes") for path in (ROOT / folder).rglob("*.py")
    }


def test_an_installed_recipe_finds_its_config_and_in_two_processes_all_mistakes_are_said_once(
    installed: Path, tmp_path: Path
) -> None:
    mistakes = ["trainer.num_thread=1", "sequence_length=0", "parallel.tensor=3"]
    ended = started(tmp_path, "evaluate", "--nproc-per-node=2", "--config-name=evaluate", *mistakes, root=installed)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    heading, *lines = ended.stderr.splitlines()
    assert heading == "5 problems in the configuration:"
    assert [line.strip().partition(" = ")[0] for line in lines] == [
        "trainer.num_thread",
        "init_from.checkpoint",
        "sequence_length",
        "parallel.tensor x pipeline x context",
        "data.path",
    ]
    assert "sequence_length = 0: must be at least 2" in ended.stderr and "init_from.checkpoint = null" in ended.stderr
    assert "must divide the number of processes = 2" in lines[-2]
    assert list(tmp_path.iterdir()) == []
