"""The folder of one run: created once, resumed on request, never overwritten silently."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from elastic.train.checkpoint_find import list_checkpoints, newest_whole, set_aside_newer
from elastic.train.checkpoint_metadata import CheckpointError
from elastic.train.config_sections import ExpManagerConfig
from elastic.train.parallel import World

CONFIG_FILE = "config.json"


class RunFolderError(ValueError):
    """A run folder that exists and may be neither resumed nor replaced."""


def open_run_folder(
    settings: ExpManagerConfig, config: Mapping[str, Any], world: World, *, resume: bool = False
) -> tuple[Path, Path | None]:
    """Create exp_dir/name/version with the resolved config; return it and its newest checkpoint, if it goes on.

    Rank 0 decides, all ranks learn the same answer. Whether that checkpoint is whole is for `checkpoint_to_resume`
    to say. Raises RunFolderError for an existing folder unless `resume` (and it holds a checkpoint or nothing worth
    keeping) or exp_manager.overwrite.
    """
    answer: list[Any] = [None, None]
    if world.is_main:
        try:
            answer[0] = prepare_run_folder(settings, config, resume=resume)[1]
        except RunFolderError as error:
            answer[1] = str(error)
    torch.distributed.broadcast_object_list(answer, src=0)
    newest, problem = answer
    if problem is not None:
        raise RunFolderError(problem)
    return Path(settings.run_dir), newest


def checkpoint_to_resume(folder: Path, world: World, *, full: bool, say: Callable[[str], object]) -> Path:
    """Return the newest whole checkpoint of a run; all ranks call this together and share the checking.

    Newer ones that are not whole are named, and renamed, so that the run can write those steps again. Raises
    CheckpointError on all ranks if none is whole.
    """
    newest = newest_whole(folder, full=full, world=world, say=say)
    problem: list[str | None] = [None]
    if world.is_main:
        try:
            set_aside_newer(newest, say)
        except CheckpointError as error:
            problem[0] = str(error)
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])
    return newest


def prepare_run_folder(
    settings: ExpManagerConfig, config: Mapping[str, Any], *, resume: bool = False
) -> tuple[Path, Path | None]:
    """Do what `open_run_folder` says for a verb that runs in one process."""
    folder, newest = Path(settings.run_dir), None
    if folder.exists() and any(folder.iterdir()):
        checkpoints = list_checkpoints(folder)
        if settings.overwrite:
            shutil.rmtree(folder)
        elif resume and checkpoints:
            newest = checkpoints[-1]
        elif not (resume and is_unfinished(folder)):
            raise RunFolderError(
                f"{folder} exists already. Choose another exp_manager.name or exp_manager.version, or set "
                f"exp_manager.overwrite=true to replace it"
                + (", or exp_manager.resume_if_exists=true to go on" if not resume and checkpoints else "")
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, config)
    return folder, newest


def write_json(path: Path, content: Any) -> None:
    """Write JSON aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".writing")
    aside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    aside.rename(path)


def is_unfinished(folder: Path) -> bool:
    """Tell whether a run was stopped before its first checkpoint: logs, config and an unfinished checkpoint only."""
    expected = (CONFIG_FILE, "metrics.jsonl", "tensorboard", "checkpoints")
    return not list_checkpoints(folder) and all(path.name in expected for path in folder.iterdir())
