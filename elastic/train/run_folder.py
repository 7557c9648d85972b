"""The folder of one run: created once, resumed on request, never overwritten silently."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from elastic.train.checkpoint import list_checkpoints
from elastic.train.config_sections import ExpManagerConfig
from elastic.train.parallel import World

CONFIG_FILE = "config.json"


class RunFolderError(ValueError):
    """A run folder that exists and may be neither resumed nor replaced."""


def open_run_folder(
    settings: ExpManagerConfig, config: Mapping[str, Any], world: World, *, resume: bool = False
) -> tuple[Path, Path | None]:
    """Create exp_dir/name/version with the resolved config; return it and the checkpoint to resume from, if any.

    Rank 0 decides, all ranks learn the same answer. Raises RunFolderError for an existing folder unless `resume` (and
    it holds a checkpoint or nothing worth keeping) or exp_manager.overwrite.
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
    expected = (CONFIG_FILE, "metrics.jsonl", "events.jsonl", "tensorboard", "checkpoints", "nonfinite", "watchdog")
    return not list_checkpoints(folder) and all(path.name in expected for path in folder.iterdir())
