"""Logits of a nested checkpoint's subnet, which exports are compared with, in fp32 on the CPU.

Run as a program, it computes them in a process that sees no GPU.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.checkpoint.read import StoredTensors
from elastic.checkpoint.record import Record
from elastic.hf.export_settings import DtypeRule
from elastic.hf.reload import run_without_gpu
from elastic.model.model import build_model
from elastic.space.gates import Gates
from elastic.space.shape import Subnet
from elastic.verbs.fp8_loss import cut_in_fp8, load_as_exported
from elastic.verbs.members import Member, OpenCheckpoint
from elastic.world.groups import Layout, world


def subnet_logits(
    opened: OpenCheckpoint, member: Member, dtypes: DtypeRule, in_fp8: bool = False, activations: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the function from tokens to the logits of a member's subnet, its weights rounded as an export's, and
    `activations` as engines round them in FP8.
    """
    # A GPU's matrix units round fp32 to TF32 and a right export would be refused: a child process computes there.
    computed = logits_in_child if torch.cuda.is_available() else nested_logits
    return partial(computed, opened.checkpoint, member.subnet, dtypes, in_fp8, activations)


def logits_in_child(
    checkpoint: Path, subnet: Subnet, dtypes: DtypeRule, in_fp8: bool, activations: bool, tokens: Tensor
) -> Tensor:
    """Compute `nested_logits` in a process that sees no GPU; raises ExportError if it fails."""
    fp8 = {"in_fp8": in_fp8, "activations": activations}
    told = json.dumps({"subnet": asdict(subnet), "dtypes": dtypes.to_json(), **fp8})
    failed = "the logits to compare with were not computed"
    return run_without_gpu("elastic.verbs.subnet_logits", [str(checkpoint), told], {"tokens": tokens}, failed)["logits"]


@torch.no_grad()
def nested_logits(
    checkpoint: Path, subnet: Subnet, dtypes: DtypeRule, in_fp8: bool, activations: bool, tokens: Tensor
) -> Tensor:
    """Return logits [B, S, V] of `subnet` in the checkpoint's nested model, in fp32, from tokens [B, S].

    The weights are rounded as the export rounds them: only the structure is compared. `activations`: cut out, in FP8.
    """
    record = Record.read(checkpoint)
    gates: Gates | None = Gates.slice(subnet)
    tensors = StoredTensors(checkpoint, record.shape)
    with world(Layout()) as here:
        if activations:
            model, gates = cut_in_fp8(tensors, record.space(), subnet, dtypes), None
        else:
            model = build_model(record.space(), Layout(), seed=None).eval()
            load_as_exported(model, tensors.__getitem__, dtypes, in_fp8)
        hidden = model(tokens.to(here.device), gates)
        return (hidden @ model.head_weight(gates).t()).transpose(0, 1).cpu()


def _main(checkpoint: str, told: str, given: str, answer: str) -> None:
    content = json.loads(told)
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content["subnet"].items()
    }
    tokens = load_file(given)["tokens"]
    dtypes = DtypeRule.from_json(content["dtypes"])
    fp8 = content["in_fp8"], content["activations"]
    logits = nested_logits(Path(checkpoint), Subnet(**fields), dtypes, *fp8, tokens)
    save_file({"logits": logits.contiguous()}, answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
