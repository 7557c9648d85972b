"""Compare mamba-ssm's real kernels, in Triton's interpreter on a CPU, with the PyTorch scan over isolated documents.

A program of its own: where `mamba_ssm` can be imported, transformers calls its kernels on CPU tensors too. Takes the
folder of an unpacked source distribution and prints, as JSON, by case and quantity the errors of both against fp64.
"""

import contextlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from elastic.model.backends import SCAN, import_module
from elastic.model.state_space import MambaSsmStateSpace, TorchStateSpace
from tests.parity.model_factory import relative_error

CHUNK, HEADS, CHANNELS, GROUPS, STATE = 16, 4, 16, 2, 16
# Lengths of the documents of two rows: on, beside and far from the chunks' edges, of one token, none ending inside.
CASES: dict[str, tuple[list[int], list[int]] | None] = {
    "one document": None,
    "on the edges": ([16, 16, 8], [32, 8]),
    "beside the edges": ([15, 2, 16, 7], [1, 17, 1, 13, 8]),
    "of one token each": ([1] * 40, [40]),
}
LENGTH = 40


def interpret() -> None:
    """Prepare what the kernels ask a GPU for; of the settings that Triton would try out, leave the first."""
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[misc, assignment]
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=1)
    import_module(SCAN.module)
    modules = [module for name, module in sys.modules.items() if name.startswith("mamba_ssm")]
    for tuned in (value for module in modules for value in vars(module).values() if hasattr(value, "fn")):
        for kernel in (tuned, tuned.fn):
            if hasattr(kernel, "configs"):
                kernel.configs = kernel.configs[:1]


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the leaves of a scan by name."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (2, LENGTH, HEADS, CHANNELS), "dt": (2, LENGTH, HEADS), "dt_bias": (HEADS,), "a_log": (HEADS,)}
    sizes |= {"b": (2, LENGTH, GROUPS, STATE), "c": (2, LENGTH, GROUPS, STATE), "d": (HEADS,)}
    drawn = {name: torch.randn(size, generator=generator) / 2 for name, size in sizes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in drawn.items()}


def outcome(backend: TorchStateSpace, documents: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the output and the gradients of a fixed weighting of it."""
    leaves = inputs(dtype)
    a = -torch.exp(leaves["a_log"])
    given = {name: value for name, value in leaves.items() if name != "a_log"}
    y = backend.scan(**given, a=a, documents=documents)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape).to(dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), weights)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def leaked(backend: TorchStateSpace) -> float:
    """Return the largest gradient that a document's outputs leave on the inputs of the one in front of it."""
    leaves = inputs(torch.float32)
    documents = (torch.arange(LENGTH, dtype=torch.int32) >= 19).int().expand(2, -1).contiguous()
    given = {name: value for name, value in leaves.items() if name != "a_log"}
    y = backend.scan(**given, a=-torch.exp(leaves["a_log"]), documents=documents)
    found = torch.autograd.grad(y[:, 19:].square().sum(), [leaves[name] for name in ("x", "b", "dt")])
    return max(float(gradient[:, :19].abs().max()) for gradient in found)


def main() -> None:
    """Print the errors of the kernels and of PyTorch, both in fp32, against PyTorch in fp64."""
    sys.path.append(sys.argv[1])
    interpret()
    kernels, plain = MambaSsmStateSpace(CHUNK), TorchStateSpace(CHUNK)
    rows: dict[str, Any] = {"leak": leaked(kernels), "errors": {}}
    for case, lengths in CASES.items():
        documents = None
        if lengths is not None:
            numbered = (torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths)
            documents = torch.stack(list(numbered)).int()
        exact = outcome(plain, documents, torch.float64)
        found, twin = (outcome(backend, documents, torch.float32) for backend in (kernels, plain))
        of = {name: [relative_error(of[name], exact[name]) for of in (found, twin)] for name in exact}
        rows["errors"][case] = of
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
