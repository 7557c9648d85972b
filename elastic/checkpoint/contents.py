"""The contents of a checkpoint: every file with size and checksum, written last (manifest.json) and looked at first.

A folder is a whole checkpoint when that list is readable, and it holds exactly the files of the list, as they were
written. Each rank hashes its files while it writes them; when a checkpoint is verified, each rank hashes a share.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch

from elastic.world.files import file_problems, first_few, flush_to_disk, sha256_of
from elastic.world.groups import World, decided_by_rank_0

CONTENTS_FILE = "manifest.json"
FORMAT = "elastic-checkpoint-1"
# Files up to this size are hashed even where only sizes are asked for: settings, router, the index of a small model.
ALWAYS_HASHED_BYTES = 1 << 20
HASHING_THREADS = 4


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or does not fit."""


@dataclass(frozen=True)
class StoredFile:
    """Size and checksum of one file."""

    size_bytes: int
    sha256: str


Files = Mapping[str, StoredFile]


def step_folders(parent: Path) -> list[Path]:
    """List the folders named like finished checkpoints, oldest first; whether they are whole is another question."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def writing_folder(folder: Path) -> Path:
    """Return where a checkpoint lies until it is whole."""
    return folder.with_name(folder.name + ".writing")


def write_contents(folder: Path, hashed: Files, leave_out: Collection[str] = ()) -> Files:
    """Write the contents of a folder that is complete otherwise; returns them.

    `hashed` are files whose size and checksum are known from writing them; all others are hashed here and flushed to
    the disk, but for `leave_out`, which are not there to stay. Raises CheckpointError if one of `hashed` is not there
    as it was written, OSError.
    """
    files = dict(hashed)
    for name in sorted(_names_in(folder).difference(files, leave_out)):
        files[name] = StoredFile((folder / name).stat().st_size, sha256_of(folder / name))
        flush_to_disk(folder / name)
    problems = file_problems(folder, {name: file.size_bytes for name, file in files.items()}, lambda _name, _path: None)
    if problems:
        raise CheckpointError(
            f"{folder} is not as it was written: {shown_problems(problems)}; is it on a disk that all nodes share?"
        )
    path = folder / CONTENTS_FILE
    path.write_text(_text(files))
    for changed in (path, *(below for below in folder.rglob("*") if below.is_dir()), folder):
        flush_to_disk(changed)
    return files


def read_contents(folder: Path) -> Files:
    """Read the contents of a checkpoint; raises CheckpointError when it is missing, damaged or of another format."""
    path = folder / CONTENTS_FILE
    try:
        text = path.read_text()
        content = json.loads(text)
        files = {name: StoredFile(**fields) for name, fields in content["files"].items()}
        # Our own spelling, byte for byte: this file has no checksum, and every other change shows in the files.
        if text != _text(files) or not all(_is_plausible(name, file) for name, file in files.items()):
            raise ValueError("it is not as it was written")
    except FileNotFoundError:
        raise CheckpointError(
            f"{CONTENTS_FILE} is missing: an unfinished checkpoint, or one of a version without manifests"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{CONTENTS_FILE} is damaged ({error})") from error
    return files


def damages(folder: Path, *, full: bool, world: World | None = None) -> list[str]:
    """Say what is wrong with a checkpoint, naming the files; an empty list for a whole one.

    Always: the list, no file missing or added, all sizes, and the checksums of small files. `full`: all checksums.
    Given `world` all ranks call this together, share the work and get the same answer; without, this process does all.
    """
    problems, files = decided_by_rank_0(lambda: _quick_damages(folder), world)
    if problems or not full:
        return problems
    large = [name for name, file in files.items() if file.size_bytes > ALWAYS_HASHED_BYTES]
    if world is None:
        return _changed(folder, files, large)
    large.sort(key=lambda name: (files[name].size_bytes, name), reverse=True)
    found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    own = large[torch.distributed.get_rank() :: len(found)]
    torch.distributed.all_gather_object(found, _changed(folder, files, own))
    return list(chain.from_iterable(found))


def check_whole(folder: Path) -> None:
    """Raise CheckpointError, naming the files, for a checkpoint that is not whole (sizes, and small files)."""
    if found := damages(folder, full=False):
        raise CheckpointError(f"{folder} is not whole: {shown_problems(found)}")


def what_remains(parent: Path) -> str:
    """Say which earlier checkpoint is left when a save failed."""
    whole = [folder.name for folder in step_folders(parent) if not damages(folder, full=False)]
    kept = f"{whole[-1]} is whole and stays" if whole else "there is no earlier checkpoint"
    return f"{kept}. When this is mended, the same command goes on from the newest whole checkpoint"


def shown_problems(problems: list[str]) -> str:
    """Return the first few problems as one line."""
    return "; ".join(first_few(problems))


def _is_plausible(name: str, file: StoredFile) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and type(file.size_bytes) is int and isinstance(file.sha256, str)


def _quick_damages(folder: Path) -> tuple[list[str], Files]:
    try:
        files = read_contents(folder)
        held = _names_in(folder)
    except CheckpointError as error:
        return [str(error)], {}
    except OSError as error:
        return [f"cannot be read ({error})"], {}
    problems = [problem for name, file in files.items() for problem in _problems(folder, name, file, full=False)]
    problems += [f"{name} is not in {CONTENTS_FILE}: move it away" for name in sorted(held.difference(files))]
    return problems, files


def _changed(folder: Path, files: Files, names: Iterable[str]) -> list[str]:
    """Hash the files of `names`, a few at a time."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        found = threads.map(lambda name: _problems(folder, name, files[name], full=True), names)
        return list(chain.from_iterable(found))


def _problems(folder: Path, name: str, file: StoredFile, *, full: bool) -> list[str]:
    def content_problem(_name: str, path: Path) -> str | None:
        found = sha256_of(path) if full or file.size_bytes <= ALWAYS_HASHED_BYTES else file.sha256
        return None if found == file.sha256 else f"has checksum {found}, the manifest says {file.sha256}"

    return file_problems(folder, {name: file.size_bytes}, content_problem)


def _names_in(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return names.difference((CONTENTS_FILE,))


def _text(files: Files) -> str:
    content = {"format": FORMAT, "files": {name: asdict(files[name]) for name in sorted(files)}}
    return json.dumps(content, indent=1) + "\n"
