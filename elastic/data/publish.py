"""Write a folder aside and rename it when whole, so that a kill never leaves something that looks finished."""

import errno
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic.data.manifest import DataError
from elastic.world.file_records import flush_to_disk

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
    """Give an empty folder next to `target`; rename it to `target` when the block ends well, else remove it.

    With `replace`, what stands at `target` is replaced as a whole, the old folder being removed last; without, only an
    absent or empty `target` is filled, also when something appeared there in the meantime. A killed process leaves
    a folder `.<name>.partial-*`, which nothing reads. Raises DataError when the place cannot be written to.
    """
    target = target.resolve()  # a link to a folder on another disk stays a link
    token = uuid.uuid4().hex[:12]
    aside = target.parent / f".{target.name}.partial-{token}"
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in [*sorted(aside.iterdir()), aside]:
            flush_to_disk(path)
        replaced = target.parent / f".{target.name}.replaced-{token}"
        if replace and target.exists():
            target.rename(replaced)
        aside.rename(target)
        flush_to_disk(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno not in CANNOT_WRITE:
            raise
        raise DataError(
            f"output_dir = {target}: cannot be written ({error.strerror}); free the space or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
