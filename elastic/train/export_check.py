"""Which check an export gets: logits where two models in fp32 fit in memory, else value by value."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from elastic.compress.folder_check import FolderCheck, LogitCheck, ValueCheck
from elastic.compress.hf_dtypes import DtypeRule
from elastic.compress.hf_names import hf_names
from elastic.compress.model_card import deployed_params
from elastic.modules.initialize import named_global_parameters
from elastic.modules.model import Layout, build_model
from elastic.space.cost import shape_cost
from elastic.space.gates import Gates
from elastic.train.family import Member, OpenFamily
from elastic.train.parallel import world

_FP32_BYTES = 4
# Transient copies while a folder is loaded, activations and logits of the probe.
_HEADROOM = 1.25
_CGROUP = Path("/sys/fs/cgroup")


def choose_check(
    family: OpenFamily,
    member: Member,
    dtypes: DtypeRule,
    wanted: Literal["auto", "logits", "values"],
    tolerance: float,
) -> FolderCheck:
    """Return the check of one member's folder; `auto` decides by the memory that is free now."""
    parent = family.space.parent
    if wanted == "auto":
        needed = logit_check_bytes(family, member)
        wanted = "logits" if needed <= available_memory_bytes() else "values"
    if wanted == "logits":
        return LogitCheck(subnet_logits(family, member, dtypes), tolerance)
    return ValueCheck(family.tensors(), parent, member.subnet, family.space.lanes)


def logit_check_bytes(family: OpenFamily, member: Member) -> int:
    """Return the memory of the nested parent and the reloaded submodel, both in fp32, with headroom."""
    parent = family.space.parent
    params = shape_cost(parent).params + deployed_params(member.subnet.shape(parent))
    return int(params * _FP32_BYTES * _HEADROOM)


def available_memory_bytes() -> int:
    """Return the memory this process may still take: the machine's, or less in a container with a limit."""
    available = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return min(available, limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available


def subnet_logits(family: OpenFamily, member: Member, dtypes: DtypeRule) -> Callable[[Tensor], Tensor]:
    """Return the function tokens [B, S] -> logits [B, S, V] of the subnet inside the nested model, in fp32.

    The weights are rounded as the export rounds them, so that the comparison sees the structure alone.
    """

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        tensors, gates = family.tensors(), Gates.slice(member.subnet)
        with world(Layout()) as here:
            model = build_model(family.space, Layout()).eval()
            for name, parameter in named_global_parameters(model):
                parameter.copy_(tensors[name].to(dtypes.of(hf_names(name)[0])))
            hidden = model(tokens.to(here.device), gates)
            return (hidden @ model.head_weight(gates).t()).transpose(0, 1).cpu()

    return logits
