"""The folder of one run: created once, resumed on request, never overwritten silently."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic.checkpoint.find import list_checkpoints
from elastic.config.sections import ExpManagerConfig
from elastic.hf.safe_files import UnsafeFileError, read_json
from elastic.world.files import write_json
from elastic.world.groups import World, decided_by_rank_0

CONFIG_FILE, WANDB_FILE = "config.json", "wandb.json"
FAMILY_FILE = "family.yaml"  # what import_hf offers to edit
FINISHED_FILE = "finished.json"  # of a run that has nothing left to do: a chain of jobs ends on it
LOGS = (
    "metrics.jsonl",
    "events.jsonl",
    "choices.jsonl",
    "report.html",
    "tensorboard",
    "wandb",
    "nonfinite",
    "watchdog",
)
OF_A_START = (CONFIG_FILE, WANDB_FILE, FAMILY_FILE, *LOGS, "checkpoints")
CONFIG_LIMIT_BYTES = 64 << 20  # a config holds tables of times, too
LOCK_WAIT_S = 60.0  # what is left of a killed attempt may take that long to be gone


class RunFolderError(ValueError):
    """A run folder that exists and may be neither resumed nor replaced."""


@contextmanager
def open_run_folder(
    settings: ExpManagerConfig, config: Mapping[str, Any], world: World | None, *, resume: bool = False
) -> Iterator[Path]:
    """Prepare the run folder for these processes alone (`world` None: this one), and keep others out of it meanwhile.

    Raises RunFolderError, on all ranks, where `run_lock` or `prepare_run_folder` does.
    """
    folder = Path(settings.run_dir)
    with run_lock(folder, world):
        decided_by_rank_0(lambda: prepare_run_folder(settings, config, resume=resume), world)
        yield folder


def prepare_run_folder(settings: ExpManagerConfig, config: Mapping[str, Any], *, resume: bool = False) -> None:
    """Create exp_dir/name/version with the resolved config; call under `run_lock`.

    Raises RunFolderError for a folder that holds something, unless exp_manager.overwrite, and then it is a run's, or
    `resume`, and then what it holds is a checkpoint or nothing worth keeping. Whether a run may go on from a checkpoint
    is for resume.py to say.
    """
    folder = Path(settings.run_dir)
    checkpoints = list_checkpoints(folder)
    if settings.overwrite and (is_of_a_run(folder) or is_left_over(folder, resume=True)):
        _remove(folder)
    elif not (resume and checkpoints) and not is_left_over(folder, resume=resume):
        if settings.overwrite:
            raise RunFolderError(
                f"{folder} holds no {CONFIG_FILE} of a run, and exp_manager.overwrite=true replaces runs alone. Choose "
                "another exp_manager.name or exp_manager.version, or remove the folder by hand"
            )
        raise RunFolderError(
            f"{folder} exists already. Choose another exp_manager.name or exp_manager.version, or set "
            f"exp_manager.overwrite=true to replace it"
            + (", or exp_manager.resume_if_exists=true to go on" if not resume and checkpoints else "")
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, config)


def _remove(folder: Path) -> None:
    """Remove a folder, aside: where that is cut short, what is left is in nobody's way."""
    aside = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


def is_left_over(folder: Path, *, resume: bool) -> bool:
    """Tell whether a folder holds no more than a refused or killed start left: its config, or nothing.

    With `resume`, whatever a run has before its first checkpoint: logs, config and an unfinished checkpoint.
    """
    expected = OF_A_START if resume else (CONFIG_FILE,)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    # world/files.py: written_aside leaves .<name>.partial-* where it is killed.
    others = [name for name in names if name not in expected and not (name[0] == "." and ".partial-" in name)]
    return not others and not list_checkpoints(folder)


def is_of_a_run(folder: Path) -> bool:
    """Tell whether a folder holds the config that every run writes first: others' are not ours to replace."""
    try:
        return "exp_manager" in read_json(folder / CONFIG_FILE, CONFIG_LIMIT_BYTES)
    except UnsafeFileError:
        return False


@contextmanager
def run_lock(folder: Path, world: World | None) -> Iterator[None]:
    """Keep two process groups from writing into one folder at a time: a lock beside it, which a kill releases.

    Waits a while for another holder to end, then raises RunFolderError on all ranks. Where the file system knows no
    locks, there is none.
    """
    path = folder.parent / f".{folder.name}.lock"

    def take() -> int:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline_s = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
                    os.close(descriptor)
                    raise RunFolderError(
                        f"{folder}: another run writes there ({holder}); end it, or choose another "
                        f"exp_manager.name or exp_manager.version"
                    ) from None
                time.sleep(0.2)
            except OSError:  # ENOLCK, ENOSYS: a file system without locks
                break
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        return descriptor

    descriptor = decided_by_rank_0(take, world)
    try:
        yield
    finally:
        if world is None or world.is_main:
            os.close(descriptor)
