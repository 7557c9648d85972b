"""The one place that adapts torch to a machine without a GPU, so that Megatron-Core's data-parallel wrapper, optimizer
and pipeline schedules run on gloo.

Megatron-Core asks `torch.cuda` for the current device, streams and random state even where no kernel needs them. Each
adaptation below names who asks; `tests/unit/test_cpu_backend.py` takes them away one at a time and shows that
something breaks. `torch.cuda.is_available()` is never touched.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _NoStream:
    """Stands in for a CUDA stream or event: work on the CPU is already in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def record_event(self, *_args: Any) -> "_NoStream":
        return _NoStream()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaLiteralsOnCpu(TorchFunctionMode):
    """Turns ``device="cuda"`` literals into the CPU (gradient clipping, token counts, tensor exchange)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


class _CudaTypeNames(TorchFunctionMode):
    """Answers ``Tensor.type()`` with the CUDA name, the only ones the optimizer's parameter check accepts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _adapt_current_device() -> None:
    """Asked by DistributedDataParallel and the schedules when they allocate."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda device: None


def _adapt_streams() -> None:
    """Asked by gradient reduction and by the optimizer's gradient copy."""
    torch.cuda.current_stream = lambda _device=None: _NoStream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.Event = _NoStream  # type: ignore[assignment,misc]


def _adapt_synchronize() -> None:
    """Asked by pipeline communication after each exchange."""
    torch.cuda.synchronize = lambda device=None: None


def _adapt_cuda_literals() -> None:
    _CudaLiteralsOnCpu().__enter__()


def _adapt_type_names() -> None:
    _CudaTypeNames().__enter__()


ADAPTATIONS: dict[str, Callable[[], None]] = {
    "current_device": _adapt_current_device,
    "streams": _adapt_streams,
    "synchronize": _adapt_synchronize,
    "cuda_literals": _adapt_cuda_literals,
    "type_names": _adapt_type_names,
}


def use_cpu_backend(without: Iterable[str] = ()) -> None:
    """Install the adaptations in this process, once; does nothing where a GPU is present.

    `without` leaves some out by name, for the test that shows they are needed. With dropout 0 nothing random happens
    in the forward pass, so Megatron-Core's tensor-parallel random states are told to stay out of the way.
    """
    if torch.cuda.is_available() or isinstance(torch.cuda.current_device, _Installed):
        return
    for name, adapt in ADAPTATIONS.items():
        if name not in set(without):
            adapt()
    if "current_device" not in set(without):
        torch.cuda.current_device = _Installed()  # type: ignore[assignment]
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True)


class _Installed:
    """The replaced `current_device`, recognisable so that a second installation is not stacked on the first."""

    def __call__(self) -> torch.device:
        return CPU
