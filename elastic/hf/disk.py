"""Ask for disk space before the first byte is written."""

import shutil
from pathlib import Path


class DiskSpaceError(ValueError):
    """The disk a folder would lie on cannot hold it."""


def check_free_space(target: Path, num_bytes: int, what: str) -> None:
    """Raise DiskSpaceError unless the disk of `target` has `num_bytes` free.

    `target` need not exist yet: the nearest folder above it that does decides. Nothing is created. `what` names
    what will be written, for the message.
    """
    existing = target.absolute()
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise DiskSpaceError(
            f"not enough disk for {what} in {target}: {num_bytes / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB free on "
            f"the disk of {existing}; free {(num_bytes - free) / 1e9:,.2f} GB or write to another disk"
        )
