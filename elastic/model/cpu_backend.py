"""The one place that adapts torch to a machine without a GPU, so that Megatron-Core's data-parallel wrapper, optimizer
and pipeline schedules run on gloo.

Megatron-Core asks `torch.cuda` for the current device and stream even where no kernel needs them. Each
adaptation below names who asks; `tests/distributed/test_cpu_backend.py` takes them away one at a time and shows that
something breaks. `torch.cuda.is_available()` is never touched.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

CPU = torch.device("cpu")


def _with_literals(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Take ``device="cuda"`` for the CPU: token counts, the gradient norm, the optimizer's constants.

    Only what makes tensors is wrapped: a torch function mode would see every operation of every layer, a fifth and
    more of a small run's time.
    """

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return make(*args, **kwargs)

    return made


def _stay(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Return the tensor: a tied head's copy is asked to go to the GPU."""
    return tensor


def _current_device() -> torch.device:
    """Return the CPU: asked by DistributedDataParallel and the schedules when they allocate."""
    return CPU


def _nothing(device: Any = None) -> None:
    """Do nothing: the gradient reduction asks for a stream, to wait on it for CUDA graphs alone; a checkpoint of
    Megatron-Core's synchronises before it is written."""


_type = torch.Tensor.type


def _cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Answer with the CUDA name of a type, the only ones the optimizer's parameter check accepts."""
    result = _type(tensor, *args, **kwargs)
    return f"torch.cuda.{result.split('.')[-1]}" if isinstance(result, str) else result


def _replace(owner: Any, name: str, by: Callable[..., Any]) -> Callable[[], None]:
    return lambda: setattr(owner, name, by)


ADAPTATIONS: dict[str, Callable[[], object]] = {
    "current_device": _replace(torch.cuda, "current_device", _current_device),
    "current_stream": _replace(torch.cuda, "current_stream", _nothing),
    "synchronize": _replace(torch.cuda, "synchronize", _nothing),
    "tensor_literals": _replace(torch, "tensor", _with_literals(torch.tensor)),
    "zeros_literals": _replace(torch, "zeros", _with_literals(torch.zeros)),
    "to_cuda": _replace(torch.Tensor, "cuda", _stay),
    "type_names": _replace(torch.Tensor, "type", _cuda_type),
}


def use_cpu_backend(without: Iterable[str] = ()) -> None:
    """Install the adaptations in this process, once; does nothing where a GPU is present.

    `without` leaves some out by name, for the test that shows they are needed.
    """
    left_out = set(without)
    assert left_out <= ADAPTATIONS.keys(), f"unknown adaptations: {left_out - ADAPTATIONS.keys()}"
    installed = torch.cuda.current_device is _current_device or torch.Tensor.type is _cuda_type  # one may be left out
    if not torch.cuda.is_available() and not installed:
        for name in ADAPTATIONS.keys() - left_out:
            ADAPTATIONS[name]()
