"""The helper process of Megatron-Core's saves, started so that it costs nothing and never outlives a killed rank."""

import ctypes
import os
import signal
from multiprocessing.util import register_after_fork

from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

PR_SET_PDEATHSIG = 1


class _DieWithParent:
    """Registered while the helper is forked: the kernel will kill it when this process ends, however that happens."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != self.parent:  # it ended in between
            os._exit(1)


def start_save_helper() -> None:
    """Fork the process that collects the results of this rank's saves; call before process groups are made.

    Megatron-Core starts it at the first save otherwise, as a new interpreter that imports the recipe, NeMo included,
    and that stays for ever when the rank is killed.
    """
    tie = _DieWithParent()
    register_after_fork(tie, _DieWithParent.__call__)
    get_write_results_queue("fork")
