"""Read the next step's micro-batches on a thread while the device computes this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Self

import torch

from elastic.data.stream import Batch
from elastic.router.phases import Curriculum, Moment


class ReadAhead:
    """Hands out each step's micro-batches, read one step ahead; closes its thread where its `with` block ends.

    What a step reads is what `read` gives for it, a pure function of the step: whatever is read ahead and not used, at
    a stop or a kill, is read again. On GPUs the tensors are pinned, so that copying them waits for nothing.
    """

    def __init__(self, read: Callable[[Moment], list[Batch]], curriculum: Curriculum, num_steps: int) -> None:
        self._read, self._curriculum, self._num_steps = read, curriculum, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def batches(self, moment: Moment) -> list[Batch]:
        """Return the micro-batches of one step, in the order they run, and begin to read those of the next.

        Raises what reading them raised, at the step they are for.
        """
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == moment.step else self._ready(moment)
        following = moment.step + 1
        if following < self._num_steps:
            self._ahead = following, self._thread.submit(self._ready, self._curriculum.at(following))
        return batches

    def _ready(self, moment: Moment) -> list[Batch]:
        batches = self._read(moment)
        return [_pinned(batch) for batch in batches] if torch.cuda.is_available() else batches


def _pinned(batch: Batch) -> Batch:
    tensors = ((name, value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor))
    return replace(batch, **{name: tensor.pin_memory() for name, tensor in tensors})  # type: ignore[arg-type]
