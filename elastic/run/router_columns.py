"""Load a router trained for other budgets: its one-hot inputs are columns, moved by the names of the budgets."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from elastic.checkpoint.state import ROUTER_FILE
from elastic.router.router import Router


@torch.no_grad()
def load_router_columns(
    folder: Path, router: torch.nn.Module, optimizer: Optimizer, old: Sequence[str], new: Sequence[str]
) -> None:
    """Load weights and Adam state of a router for the budgets `old` into one for the budgets `new`.

    Everything but the first layers' weights [hidden width, budgets] is shared by all budgets and loads as it is. A
    column of a budget that both know moves to its new index; that of a new budget keeps its fresh values, with zero
    moments. Adam's step count stays: it corrects a bias that zero moments of a new column have again for a while.
    """
    assert isinstance(router, Router)
    tensors = load_file(folder / ROUTER_FILE)
    pairs = [(old.index(name), column) for column, name in enumerate(new) if name in old]
    first_layers = {f"networks.{axis}.0.weight" for axis in router.sizes}

    def fitted(saved: Tensor, fresh: Tensor) -> Tensor:
        result = fresh.clone()
        for source, column in pairs:
            result[:, column] = saved[:, source].to(fresh.device)
        return result

    for name, parameter in router.named_parameters():
        saved = tensors[f"router/{name}"]
        moved = name in first_layers
        parameter.copy_(fitted(saved, parameter) if moved else saved)
        state = {}
        for field in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"adam/{name}/{field}")
            if value is not None:
                moments = field != "step"
                fresh = torch.zeros_like(parameter)
                state[field] = (
                    fitted(value, fresh) if moved and moments else value.to(fresh.device if moments else "cpu")
                )
        if state:
            optimizer.state[parameter] = state
