"""Find the checkpoint a user or a resumed run means: the newest whole one, said aloud when newer ones are not.

There is no pointer file that could be wrong: the folders themselves are looked at, by rank 0 for all.
"""

from collections.abc import Callable
from pathlib import Path

from elastic.checkpoint.contents import CONTENTS_FILE, CheckpointError, damages, shown_problems, step_folders
from elastic.checkpoint.record import RECORD_FILE
from elastic.world.files import first_few
from elastic.world.groups import World, decided_by_rank_0

FOLDER = "checkpoints"
BROKEN = ".broken"


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run_folder / FOLDER / f"step_{step:08d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first, whole or not."""
    return step_folders(run_folder / FOLDER)


def newest_whole(
    run_folder: Path, *, full: bool, world: World | None = None, say: Callable[[str], object] = lambda text: None
) -> Path:
    """Return the newest whole checkpoint of a run, going back until one is.

    `say` hears (on rank 0) which were passed over and why. `full`, `world`: as `damages` takes them. Raises
    CheckpointError, with the reasons, if none is whole.
    """
    reasons: list[str] = []
    for folder in reversed(decided_by_rank_0(lambda: list_checkpoints(run_folder), world)):
        found = damages(folder, full=full, world=world)
        if not found:
            for reason in reasons if world is None or world.is_main else ():
                say(f"passed over: {reason}")
            return folder
        reasons.append(f"{folder.name} is not whole: {shown_problems(found)}")
    if not reasons:
        raise CheckpointError(f"{run_folder} is neither a checkpoint nor a run folder with one; check the path")
    raise CheckpointError(
        f"{run_folder} holds no whole checkpoint. {'. '.join(reasons)}. Bring back a copy, or start again under "
        "another exp_manager.version"
    )


def resolve_checkpoint(
    path: str | Path,
    *,
    full: bool = False,
    world: World | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Return the whole checkpoint that `path` names: itself, or the newest whole one of a run folder (of the one
    version in a folder of versions).

    Arguments as `newest_whole` takes them. Raises CheckpointError; for a checkpoint that is named but not whole it
    names the damaged files, and the nearest whole checkpoint of the same run.
    """
    folder = Path(path)

    def is_checkpoint() -> bool:
        is_named = (folder / CONTENTS_FILE).is_file() or (folder / RECORD_FILE).is_file()
        return is_named or folder in step_folders(folder.parent)

    if not decided_by_rank_0(is_checkpoint, world):
        run = decided_by_rank_0(lambda: _run_folder(folder), world)
        return newest_whole(run, full=full, world=world, say=say)
    found = damages(folder, full=full, world=world)
    if not found:
        return folder
    siblings = decided_by_rank_0(lambda: step_folders(folder.parent), world)
    index = siblings.index(folder) if folder in siblings else len(siblings)
    candidates = [*reversed(siblings[:index]), *siblings[index + 1 :]]
    nearest = next((other for other in candidates if not damages(other, full=full, world=world)), None)
    remedy = "its run has no other whole one" if nearest is None else f"the nearest whole one is {nearest}"
    raise CheckpointError(f"{folder} is not whole: {shown_problems(found)}; {remedy}")


def _run_folder(path: Path) -> Path:
    """Return the run folder that `path` names: itself, or its one version where it holds versions of a run."""
    if list_checkpoints(path) or not path.is_dir():
        return path
    versions = sorted(below.name for below in path.iterdir() if list_checkpoints(below))
    if len(versions) > 1:
        raise CheckpointError(f"{path} holds several runs: {', '.join(first_few(versions, 8))}; choose one of them")
    return path / versions[0] if versions else path


def set_aside_newer(checkpoint: Path, say: Callable[[str], object]) -> None:
    """Rename the broken checkpoints after the one a run goes on from: it will write those steps again.

    Nothing is deleted: they stay as `step_N.broken`. Raises CheckpointError if the folder may not be written.
    """
    siblings = step_folders(checkpoint.parent)
    for folder in siblings[siblings.index(checkpoint) + 1 :]:
        number, aside = 1, folder.with_name(folder.name + BROKEN)
        while aside.exists():
            number, aside = number + 1, folder.with_name(f"{folder.name}{BROKEN}{number + 1}")
        try:
            folder.rename(aside)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be renamed ({error.strerror}); move it away by hand") from error
        say(f"{folder.name} stays as {aside.name}; remove it when it is not needed any more")
