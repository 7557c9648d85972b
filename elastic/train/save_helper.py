"""The helper process of Megatron-Core's saves, started so that it lives exactly as long as its rank."""

import ctypes
import os
import signal
from multiprocessing.util import register_after_fork

from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

PR_SET_PDEATHSIG = 1


class _TiedToParent:
    """Called in the helper when it is forked: it ignores what tells a job to stop, and the kernel ends it when its
    rank ends, however that happens."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # torchrun and Slurm signal it too; the last save needs it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != self.parent:  # it ended in between
            os._exit(1)


def start_save_helper() -> None:
    """Fork the process that collects the results of this rank's saves; call before process groups are made.

    Megatron-Core starts it at the first save otherwise, as a new interpreter that imports the recipe, NeMo included,
    dies of the SIGTERM that its rank answers with a checkpoint, and stays for ever when the rank is killed.
    """
    tie = _TiedToParent()
    register_after_fork(tie, _TiedToParent.__call__)
    get_write_results_queue("fork")
