"""Write a folder aside and rename it when whole, so that a kill never leaves something that looks finished."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic.data.manifest import DataError
from elastic.world import files

CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
)


@contextmanager
def written_aside(target: Path, *, replace: bool) -> Iterator[Path]:
    """Give an empty folder next to `target` and rename it, as world/files.py says.

    Raises DataError when it cannot be written there.
    """
    try:
        with files.written_aside(target, replace=replace) as aside:
            aside.mkdir()
            yield aside
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise DataError(
            f"output_dir = {target}: cannot be written ({error.strerror}); free the space or choose another place"
        ) from error
