"""What computes the parts that differ between machines: chosen here and nowhere else, by what is installed.

On a CPU everything is plain PyTorch. On a GPU the elementwise work is Triton's (elastic/kernels), and each of GPU_PARTS
is another package's if it can be imported, else PyTorch's, which is slower and needs more memory.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch

from elastic.model.attention import SdpaCoreAttention
from elastic.model.elementwise import TorchElementwise, TritonElementwise
from elastic.model.state_space import MambaSsmStateSpace, TorchStateSpace


@dataclass(frozen=True)
class GpuPart:
    """A part of a GPU run that another package computes: what pip calls it, what is imported, what stands in for it."""

    name: str
    package: str
    module: str
    instead: str


ATTENTION = GpuPart("attention", "transformer-engine", "transformer_engine.pytorch", "PyTorch's flash attention")
SCAN = GpuPart("scan", "mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "PyTorch's chunked scan")
# Of two packages Megatron-Core takes the first that is there; without either it takes torch's.
ADAM = GpuPart("Adam", "transformer-engine", "transformer_engine.pytorch.optimizers", "PyTorch's fused AdamW")
GPU_PARTS = (ATTENTION, SCAN, ADAM)


@dataclass(frozen=True)
class Kernels:
    """The implementation of each part, as the model's modules are built with it."""

    state_space: TorchStateSpace
    core_attention: type
    elementwise: TorchElementwise = field(default_factory=TorchElementwise)

    @classmethod
    def choose(cls, device: torch.device | None = None) -> "Kernels":
        """Pick for a device, by default a GPU where there is one."""
        if (device or torch.device("cuda" if torch.cuda.is_available() else "cpu")).type != "cuda":
            return cls(TorchStateSpace(), SdpaCoreAttention)
        missing = dict(missing_parts())
        scan = TorchStateSpace() if SCAN in missing else MambaSsmStateSpace()
        if ATTENTION in missing:
            return cls(scan, SdpaCoreAttention, TritonElementwise())
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return cls(scan, TEDotProductAttention, TritonElementwise())


def missing_parts() -> Iterator[tuple[GpuPart, str]]:
    """Yield each part whose package is not there or does not load, with the reason.

    Only an import tells: a kernel built for another torch is installed and does not load.
    """
    for part in GPU_PARTS:
        try:
            import_module(part.module)
        except (ImportError, OSError) as error:
            if part is not ADAM or importlib.util.find_spec("apex") is None:
                yield part, str(error)


def in_words() -> str:
    """Say what computes the parts of a run on this machine, for its log and its record."""
    if not torch.cuda.is_available():
        return "everything by PyTorch, on the CPU"
    missing = dict(missing_parts())
    return ", ".join(f"{part.name} by {part.instead if part in missing else part.package}" for part in GPU_PARTS)


def import_module(name: str) -> ModuleType:
    """Import a module; one of mamba-ssm's Triton files also where the package's own compiled extension is missing.

    The package imports that extension for Mamba-1 before anything else. Its place is then taken by an empty module that
    only knows where the files lie.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError:
        spec = importlib.util.find_spec(package)
        if package != "mamba_ssm" or spec is None or spec.submodule_search_locations is None:
            raise
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
        return importlib.import_module(name)
