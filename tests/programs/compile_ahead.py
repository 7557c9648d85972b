"""Compile every kernel for GPUs that need not be here and print its registers and spilled bytes as JSON.

`python -m tests.programs.compile_ahead 80 90` for sm_80 and sm_90; without TRITON_INTERPRET, which makes functions of
kernels.
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

from elastic.kernels import causal_conv, gated, gated_norm, softmax_pair

ROWS = ("student_max", "teacher_max", "student_scale", "plain_scale", "teacher_scale", "label_scale")


def cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Yield (kernel, types of its pointers, constants) as the 12B launches them: bf16 save logits, gates and sums."""
    logits = {"student": "*fp32", "teacher": "*fp32"}
    for soft in (False, True):
        constants = {"HAS_TEACHER": True, "IS_SOFT": soft, "BLOCK": softmax_pair.MAX_BLOCK, "num_warps": 8}
        yield softmax_pair.statistics_kernel, logits | {"out": "*fp32"}, constants
        pointers = logits | {"gradient": "*bf16", "label": "*i64"} | dict.fromkeys(ROWS, "*fp32")
        yield softmax_pair.gradient_kernel, pointers, constants
    sums = dict.fromkeys(("gate", "depth", "active", "weight_sums", "gate_sums", "active_sums", "sums"), "*fp32")
    for gated_by_z, block in ((False, 8192), (True, 2048)):  # 5,120 hidden channels; 1,280 of a group
        norm = {"HAS_Z": gated_by_z, "HAS_GATE": gated_by_z, "HAS_ACTIVE": True, "BLOCK": block,
                "num_warps": gated_norm.num_warps(block)}  # fmt: skip
        for kernel in (gated_norm.norm_kernel, gated_norm.norm_backward_kernel):
            yield (
                kernel,
                dict.fromkeys(("x", "z", "weight", "out", "grad_out", "grad_x", "grad_z"), "*bf16") | sums,
                norm,
            )
    for relu in (False, True):
        tile = {
            "SQUARED_RELU": relu,
            "HAS_GATE": True,
            "HAS_DEPTH": not relu,
            "ROWS": gated.ROWS,
            "COLUMNS": gated.COLUMNS,
            "num_warps": 4,
        }
        rows = dict.fromkeys(("y", "x", "out", "grad_out", "grad_y"), "*bf16") | sums
        yield gated.gated_kernel, rows, tile | {"HAS_X": not relu}
        yield gated.gated_backward_kernel, rows, tile
    for resets in (False, True):
        tile = {"TAPS": 4, "HAS_POSITION": resets, "TOKENS": causal_conv.TOKENS, "CHANNELS": causal_conv.CHANNELS,
                "num_warps": 4}  # fmt: skip
        rows = dict.fromkeys(("x", "weight", "bias", "before", "out", "grad_out", "grad_x"), "*bf16")
        rows |= {"position": "*i32"} | sums
        yield causal_conv.conv_kernel, rows, tile | {"HAS_BEFORE": False}
        tile |= {"TOKENS": causal_conv.BACKWARD_TOKENS, "SPAN": causal_conv.SPAN, "SUM_ROWS": 8}
        yield causal_conv.conv_backward_kernel, rows, tile


def type_of(name: str, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    """Say what an argument is: a pointer, a constant, a real number, or a 32-bit size."""
    if name in ("tau", "epsilon", "active_number"):
        return "fp32"
    return pointers.get(name) or ("constexpr" if name in constants else "i32")


def resources(cubin: bytes) -> dict[str, int]:
    """Read registers a thread and bytes of stack and local memory (what is spilled) out of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], architecture: int) -> Any:
    """Compile as Triton does at a launch of the 12B: pointers and sizes are multiples of 16, so that loads are wide."""
    types = {name: type_of(name, pointers, constants) for name in kernel.arg_names}
    even = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind[0] in "*i"}
    values = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=even)
    options = {"num_warps": constants["num_warps"]}
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def main(architectures: list[int]) -> None:
    """Print one row for each kernel and architecture."""
    rows = []
    for architecture in architectures:
        for kernel, pointers, constants in cases():
            cubin = compiled(kernel, pointers, constants, architecture).asm["cubin"]
            row = {"architecture": architecture, "kernel": kernel.fn.__name__}
            rows.append({**row, **constants, **resources(cubin)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
