"""The set-up says in one line what is missing, touches nothing then, and does nothing where all is done."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cksum", "dirname", "ls", "mkdir", "rm", "mv")
FAKE_COMPILER = "#!/bin/sh\nexit 0\n"
FAKE_UV = """#!/bin/sh
[ "$1" = pip ] || exit 0
[ -e {folder}/interrupt ] && kill -9 $PPID
echo "$@" >>{folder}/installs
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the set-up is a bash script")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Make a folder with what the set-up reads, and a PATH with nothing but the tools it calls."""
    for name in ("pyproject.toml", "constraints.txt", "launch/bootstrap.sh"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    return tmp_path / "clone"


def put_script(folder: Path, name: str, text: str) -> Path:
    """Write an executable script into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder / name


def bootstrap(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up of the clone, away from the caller's home and PATH."""
    search = {"PATH": str(clone.parent / "bin"), "HOME": str(clone.parent)}
    script = str(clone / "launch" / "bootstrap.sh")
    return subprocess.run(["bash", script], env=search | environment, capture_output=True, text=True, timeout=60)


def test_no_python_is_one_line_that_says_what_to_install(clone: Path) -> None:
    put_script(clone.parent / "bin", "cc", FAKE_COMPILER)
    put_script(clone.parent / "bin", "python3.12", "#!/bin/sh\nexit 127\n")  # a shim that answers to nothing
    result = bootstrap(clone)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "install" in result.stderr and "3.12" in result.stderr
    assert not (clone / ".venv").exists()


def test_no_compiler_is_one_line_that_says_what_to_install(clone: Path) -> None:
    result = bootstrap(clone, PYTHON=sys.executable)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "C compiler" in result.stderr
    assert not (clone / ".venv").exists()


def test_wrong_choice_of_python_is_not_replaced_by_another(clone: Path) -> None:
    result = bootstrap(clone, PYTHON=str(put_script(clone, "old", "#!/bin/sh\nexit 1\n")))
    assert result.returncode == 1 and "PYTHON=" in result.stderr


def test_folder_of_something_else_is_refused(clone: Path) -> None:
    put_script(clone.parent / "bin", "cc", FAKE_COMPILER)
    (clone / "thesis").mkdir()
    (clone / "thesis" / "chapter").write_text("1")
    result = bootstrap(clone, PYTHON=sys.executable, VENV="thesis")
    assert result.returncode == 1 and "VENV=" in result.stderr
    assert [file.name for file in (clone / "thesis").iterdir()] == ["chapter"]


def test_set_up_goes_on_after_an_interruption_and_again_only_when_a_pin_changes(clone: Path) -> None:
    """Let a fake uv record the installs; while `interrupt` is there it kills the set-up that called it."""
    tools = clone.parent / "bin"
    log = tools / "installs"
    put_script(tools, "cc", FAKE_COMPILER)
    put_script(tools, "uv", FAKE_UV.format(folder=tools))
    put_script(tools, "interrupt", "")
    choice = {"PYTHON": sys.executable, "VENV": str(clone.parent / "shared")}
    assert bootstrap(clone, **choice).returncode == -signal.SIGKILL
    (tools / "interrupt").unlink()
    log.unlink(missing_ok=True)
    assert bootstrap(clone, **choice).returncode == 0
    assert log.read_text().count("constraints.txt") == 1
    repeated = bootstrap(clone, **choice)
    assert (repeated.returncode, repeated.stdout, repeated.stderr) == (0, "", "")
    assert log.read_text().count("constraints.txt") == 1
    with (clone / "constraints.txt").open("a") as constraints:
        constraints.write("another==1.0\n")
    assert bootstrap(clone, **choice).returncode == 0
    assert log.read_text().count("constraints.txt") == 2
