"""Compile every kernel for a GPU that need not be here and print its registers and spilled bytes as JSON.

`python -m tests.unit.kernels.compile_ahead 90` for sm_90; without TRITON_INTERPRET, which makes functions of kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from elastic.kernels import softmax_pair

ROWS = ("student_max", "teacher_max", "student_scale", "plain_scale", "teacher_scale", "label_scale")


def cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Yield (kernel, types of its pointers, constants) as the 12B launches them: fp32 logits, a bf16 gradient."""
    logits = {"student": "*fp32", "teacher": "*fp32"}
    for soft in (False, True):
        constants = {"HAS_TEACHER": True, "IS_SOFT": soft, "BLOCK": softmax_pair.MAX_BLOCK}
        yield softmax_pair.statistics_kernel, logits | {"out": "*fp32"}, constants
        pointers = logits | {"gradient": "*bf16", "label": "*i64"} | dict.fromkeys(ROWS, "*fp32")
        yield softmax_pair.gradient_kernel, pointers, constants


def type_of(name: str, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    """Say what an argument is: a pointer, a constant, the temperature, or a 32-bit size."""
    return pointers.get(name) or ("constexpr" if name in constants else "fp32" if name == "tau" else "i32")


def resources(cubin: bytes) -> dict[str, int]:
    """Read registers a thread and bytes of stack and local memory (what is spilled) out of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]


def main(architecture: int) -> None:
    """Print one row for each kernel."""
    rows = []
    for kernel, pointers, constants in cases():
        types = {name: type_of(name, pointers, constants) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
        rows.append({"kernel": kernel.fn.__name__, **constants, **resources(compiled.asm["cubin"])})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
