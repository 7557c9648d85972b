"""Import NeMo's hydra_runner without the noise that its and Megatron-Core's imports make.

Every recipe imports this module first; nothing else does.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from elastic.world.agent import end_with_agent

__all__ = ["hydra_runner"]


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


end_with_agent()  # the imports below take seconds, in which torchrun's agent may die

with held_back_output():
    from nemo.core.config import hydra_runner
    from nemo.utils import logging as nemo_logging

    import elastic.model.model  # noqa: F401 (brings in the rest of Megatron-Core, which warns of each absent package)

# Said in every process of every start, of things that are meant as they are; any other warning still shows.
for message in (
    "full scope is deprecated",  # Megatron-Core of its own default for CUDA graphs
    "MimoModelConfig is experimental",  # a model this project does not have
    "torch.distributed is disabled, unavailable or uninitialized",  # a checkpoint that one process reads, as intended
    "The argument order of load has been changed",  # torch of its own wrapper
):
    warnings.filterwarnings("ignore", message=message)

# NeMo's logger would reformat every Python warning and report it as its own.
nemo_logging.captureWarnings(False)
nemo_logging.setLevel(nemo_logging.ERROR)
