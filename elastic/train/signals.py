"""An orderly stop: SIGTERM or SIGUSR1 ends a run with a checkpoint (so does the end of torchrun's agent, agent.py).

    first signal    the running step is finished, with the validation or the save that is due; then one checkpoint is
                    written and every rank leaves with code 0. That takes at most a step, a validation and a save.
    second signal   the process leaves at once, with code 128 + number, also when it hangs in a collective.

A signal within SAME_SIGNAL_S of the first counts as the same one: Slurm and a terminal signal all processes of a job,
and torchrun's agent hands SIGTERM on to its workers as well, so that they get it twice. The agent itself dies of
SIGUSR1 unless it is ignored there (`trap "" USR1` before it), kills its workers 30 s after SIGTERM, and returns an
error after it: signal the workers, as `srun` does, where the exit code matters.

While the model is first built and loaded, and a router's start is tried (start.py), signals take their default course:
there is nothing to lose. One between two phases of different layouts ends the run before the next is built, or after
its first step. Under a launcher, whose ranks ignore SIGUSR1 until then, the file that STOP_FILE_VARIABLE names stands
for the signal: when training starts, and after every step, for a Slurm with proctrack/cgroup signals torchrun alone,
not its ranks.
"""

import os
import signal
import socket
import threading
import time
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp

from elastic.train.trainer import Callback, StepResult, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_SIGNAL_S = 3.0
STOP_FILE_VARIABLE = "ELASTIC_STOP_FILE"


class StopOnSignal(Callback):
    """Turns a signal on any rank into an orderly stop of all ranks after the running step.

    Signals are heard on a thread of its own, so that a main thread inside a collective does not delay the second one:
    Python's handlers wait until the main thread is back from C code; the byte that the interpreter writes to the
    wake-up socket for every signal does not.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_s = 0.0
        self._group: ProcessGroup | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1

    def on_start(self, trainer: Trainer) -> None:
        """Install the handlers, from the main thread. On GPUs all ranks make a gloo group: agreeing never waits."""
        if trainer.world.device.type != "cpu":
            self._group = torch.distributed.new_group(backend="gloo")
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # A forked helper process would report the signals it gets itself over the inherited socket.
        register_after_fork(self, lambda _: signal.set_wakeup_fd(-1))
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread.start()
        self._look_for_file()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Agree after each step, where all ranks have just met in the gradient norm: nobody waits for a straggler."""
        self._agree(trainer)

    def before_move(self, trainer: Trainer) -> None:
        """Agree once more: a run that was told to stop while its phase's checkpoint was written builds no layout."""
        self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        """Agree over all ranks whether one of them was told to stop: one number on the CPU. All stop at one step."""
        if trainer.world.is_main:  # one look a step, on the launcher's own node
            self._look_for_file()
        told = torch.tensor(self.received is not None, dtype=torch.int32)
        torch.distributed.all_reduce(told, op=ReduceOp.MAX, group=self._group)
        if told.item():
            trainer.stop_reason = self.received or "a signal to another rank"

    def on_end(self, trainer: Trainer) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while heard := self._reader.recv(1):
            if heard[0] in SIGNALS and self._hear(signal.Signals(heard[0]).name):
                os._exit(128 + heard[0])

    def _look_for_file(self) -> None:
        if self.received is None and Path(os.environ.get(STOP_FILE_VARIABLE, "")).is_file():
            self._hear("the launcher's signal")

    def _hear(self, what: str) -> bool:
        """Note the first reason to stop; tell whether this is another signal, long enough after it to be a second."""
        if self.received is None:
            self._received_s, self.received = time.monotonic(), what
            return False
        return time.monotonic() - self._received_s > SAME_SIGNAL_S
