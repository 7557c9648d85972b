"""Hold back what other packages print while they are imported."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back_output() -> Iterator[None]:
    """Keep everything written to stdout and stderr away from the screen; show it after all if the block raises.

    File descriptors are redirected, not sys.stderr: log handlers made inside the block must keep the real stream.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        failed = True
        try:
            for descriptor in saved:
                os.dup2(held.fileno(), descriptor)
            yield
            failed = False
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in saved.items():
                os.dup2(original, descriptor)
                os.close(original)
            if failed:
                held.seek(0)
                os.write(2, held.read())
