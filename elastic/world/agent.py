"""A worker does not outlive torchrun's agent: left alone, it would train on beside the next attempt's workers."""

import os
import signal
import threading
import time

LOOK_AT_AGENT_S = 1.0


def end_with_agent() -> None:
    """Send this process SIGTERM soon after torchrun's agent, its parent, is gone; does nothing outside torchrun.

    Until training starts that ends the process, also when it waits for its agent's store in C code; from then on it is
    an orderly stop (signals.py). Call it before anything takes long.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(os.getppid(),), name="agent", daemon=True).start()


def _follow(agent: int) -> None:
    while os.getppid() == agent:
        time.sleep(LOOK_AT_AGENT_S)
    os.kill(os.getpid(), signal.SIGTERM)
