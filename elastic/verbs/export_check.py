"""Which check an export gets: logits where two models in fp32 fit in memory, else value by value."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.checkpoint.read import StoredTensors
from elastic.checkpoint.record import Record
from elastic.hf.export import FolderCheck
from elastic.hf.export_settings import DtypeRule
from elastic.hf.names import hf_names
from elastic.hf.nested_values import value_check
from elastic.hf.reload import logit_check, run_without_gpu
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.space.cost import shape_cost
from elastic.space.gates import Gates
from elastic.space.shape import Subnet
from elastic.verbs.members import Member, OpenCheckpoint
from elastic.world.groups import Layout, world

_FP32_BYTES = 4
# Transient copies while a folder is loaded, activations and logits of the probe.
_HEADROOM = 1.25
_CGROUP = Path("/sys/fs/cgroup")


def choose_check(
    opened: OpenCheckpoint,
    member: Member,
    dtypes: DtypeRule,
    wanted: Literal["auto", "logits", "values"],
    tolerance: float,
) -> FolderCheck:
    """Return the check of one member's folder; `auto` decides by the memory that is free now."""
    parent = opened.space.parent
    if wanted == "auto":
        needed = logit_check_bytes(opened, member)
        wanted = "logits" if needed <= available_memory_bytes() else "values"
    if wanted == "logits":
        return logit_check(subnet_logits(opened.checkpoint, member.subnet, dtypes), tolerance)
    return value_check(opened.tensors(), parent, member.subnet, opened.space.lanes)


def logit_check_bytes(opened: OpenCheckpoint, member: Member) -> int:
    """Return the memory of the nested parent and the reloaded submodel, both in fp32, with headroom."""
    parent = opened.space.parent
    params = shape_cost(parent).params + shape_cost(member.subnet.shape(parent)).stored_params
    return int(params * _FP32_BYTES * _HEADROOM)


def available_memory_bytes() -> int:
    """Return the memory this process may still take: the machine's, or less in a container with a limit."""
    available = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return min(available, limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available


def subnet_logits(checkpoint: Path, subnet: Subnet, dtypes: DtypeRule) -> Callable[[Tensor], Tensor]:
    """Return the function tokens [B, S] -> logits [B, S, V] of the subnet inside the nested model, on the CPU in fp32.

    A GPU's matrix units round fp32 to TF32 and a right export would be refused, so where there is a GPU a child process
    computes. The weights are rounded as the export rounds them: only the structure is compared.
    """
    if torch.cuda.is_available():
        return partial(logits_in_child, checkpoint, subnet, dtypes)
    return partial(nested_logits, checkpoint, subnet, dtypes)


def logits_in_child(checkpoint: Path, subnet: Subnet, dtypes: DtypeRule, tokens: Tensor) -> Tensor:
    """Compute `nested_logits` in a process that sees no GPU; raises ExportError if it fails."""
    told = json.dumps({"subnet": asdict(subnet), "dtypes": dtypes.to_json()})
    failed = "the logits to compare with were not computed"
    return run_without_gpu("elastic.verbs.export_check", [str(checkpoint), told], {"tokens": tokens}, failed)["logits"]


@torch.no_grad()
def nested_logits(checkpoint: Path, subnet: Subnet, dtypes: DtypeRule, tokens: Tensor) -> Tensor:
    """Return logits [B, S, V] of `subnet` in the checkpoint's nested model, in fp32, from tokens [B, S]."""
    record, gates = Record.read(checkpoint), Gates.slice(subnet)
    tensors = StoredTensors(checkpoint, record.shape)
    with world(Layout()) as here:
        model = build_model(record.space(), Layout()).eval()
        for name, parameter in named_global_parameters(model):
            parameter.copy_(tensors[name].to(dtypes.of(hf_names(name)[0])))
        hidden = model(tokens.to(here.device), gates)
        return (hidden @ model.head_weight(gates).t()).transpose(0, 1).cpu()


def _main(checkpoint: str, told: str, given: str, answer: str) -> None:
    content = json.loads(told)
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content["subnet"].items()
    }
    tokens = load_file(given)["tokens"]
    logits = nested_logits(Path(checkpoint), Subnet(**fields), DtypeRule.from_json(content["dtypes"]), tokens)
    save_file({"logits": logits.contiguous()}, answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
