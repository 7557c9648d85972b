"""The one place that adapts torch to a machine without a GPU, so that Megatron-Core's data-parallel wrapper, optimizer
and pipeline schedules run on gloo.

Megatron-Core asks `torch.cuda` for the current device and stream even where no kernel needs them. Each
adaptation below names who asks; `tests/unit/model/test_cpu_backend.py` takes them away one at a time and shows that
something breaks. `torch.cuda.is_available()` is never touched.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaLiteralsOnCpu(TorchFunctionMode):
    """Turns ``device="cuda"`` and ``.cuda()`` into the CPU (gradient clipping, token counts, a tied head's copy).

    Every operation of every layer passes here: a second mode like it would cost a fifth of a small run's time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if not kwargs:
            return func(*args)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = kwargs | {"device": CPU}
        return func(*args, **kwargs)


def _adapt_current_device() -> None:
    """Asked by DistributedDataParallel and the schedules when they allocate."""
    torch.cuda.current_device = _Installed()  # type: ignore[assignment]


def _adapt_current_stream() -> None:
    """Asked by the gradient reduction, which only waits on it for CUDA graphs."""
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]


def _adapt_synchronize() -> None:
    """Asked by pipeline communication after each exchange, and before a checkpoint is written."""
    torch.cuda.synchronize = lambda device=None: None


def _adapt_cuda_literals() -> None:
    _CudaLiteralsOnCpu().__enter__()


def _adapt_type_names() -> None:
    """Answer ``Tensor.type()`` with the CUDA name, the only ones the optimizer's parameter check accepts."""
    original = torch.Tensor.type

    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(tensor, *args, **kwargs)  # inside a function mode torch looks `type` up again: this function
        return f"torch.cuda.{result.split('.')[-1]}" if isinstance(result, str) else result

    torch.Tensor.type = named  # type: ignore[method-assign,assignment]


ADAPTATIONS: dict[str, Callable[[], None]] = {
    "current_device": _adapt_current_device,
    "current_stream": _adapt_current_stream,
    "synchronize": _adapt_synchronize,
    "cuda_literals": _adapt_cuda_literals,
    "type_names": _adapt_type_names,
}


def use_cpu_backend(without: Iterable[str] = ()) -> None:
    """Install the adaptations in this process, once; does nothing where a GPU is present.

    `without` leaves some out by name, for the test that shows they are needed.
    """
    left_out = set(without)
    assert left_out <= ADAPTATIONS.keys(), f"unknown adaptations: {left_out - ADAPTATIONS.keys()}"
    if torch.cuda.is_available() or isinstance(torch.cuda.current_device, _Installed):
        return
    for name, adapt in ADAPTATIONS.items():
        if name not in left_out:
            adapt()


class _Installed:
    """The replaced `current_device`, recognisable so that a second installation is not stacked on the first."""

    def __call__(self) -> torch.device:
        return CPU
