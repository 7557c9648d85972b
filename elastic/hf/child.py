"""Run a module of this project in a process of its own that sees no GPU: tensors in, tensors out."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class ChildError(ValueError):
    """A child process that failed; the message ends with the end of its stderr."""


def run_without_gpu(module: str, arguments: Sequence[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run `python -m MODULE ARGUMENTS... GIVEN ANSWER`: GIVEN holds `given`, and ANSWER is read back, both safetensors.

    Raises ChildError if it ends with another code than 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors, answer = Path(scratch) / "given.safetensors", Path(scratch) / "answer.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, tensors)
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # It is alone: torchrun's variables would make it wait for other ranks.
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment = {**inherited, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", module, *arguments, str(tensors), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChildError(f"{module} in a child process failed: {done.stderr.strip()[-2000:]}")
        return load_file(answer)
