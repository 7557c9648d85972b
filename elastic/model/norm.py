"""Width-aware norms. A norm divides by the number of active channels: the sum of the gate (docs/design.md 4).

Shapes: S sequence, B batch, D hidden, G groups, I = heads x channels; lower case = this rank's shard.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from elastic.model.elementwise import TorchElementwise
from elastic.model.masks import Width


def parameter_device(config: TransformerConfig) -> torch.device | None:
    """Return where this rank's parameters are made; None: on the CPU."""
    return None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


class ElasticRMSNorm(nn.Module):
    """RMSNorm over the active hidden channels; its weight is replicated over tensor-parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        elementwise: TorchElementwise,
        **_kwargs: Any,
    ) -> None:
        super().__init__()
        self.epsilon, self.elementwise = eps, elementwise
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        # Under sequence parallelism each rank sees some tokens only; Megatron-Core then sums this gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, hidden: Width | None = None) -> Tensor:
        """Normalise `x` [S, B, d] over its active channels; `hidden` None means all of them."""
        width = x.shape[-1]
        active = width if hidden is None else hidden.active
        weight = self.weight if width == len(self.weight) else self.weight[:width]
        return self.elementwise.norm(x, weight, active, self.epsilon)


class GatedGroupNorm(nn.Module):
    """Mamba-2's gated norm: RMS over the active heads and channels of each group, weight [i] sharded with the heads."""

    def __init__(
        self, size: int, config: TransformerConfig, tp_group: Any, eps: float, elementwise: TorchElementwise
    ) -> None:
        super().__init__()
        self.epsilon, self.tp_group, self.elementwise = eps, tp_group, elementwise
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=parameter_device(config)))
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, 0  # type: ignore[attr-defined]

    def forward(
        self,
        y: Tensor,
        z: Tensor,
        groups: int,
        active: float | None,
        gate: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Normalise y silu(z) gate [S, B, i] in equal groups; without a gate `active` channels of each count."""
        weight = self.weight if weight is None else weight
        return self.elementwise.norm(y, weight, active, self.epsilon, groups, z, gate)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Shard the weight along the heads."""
        assert metadata is not None
        groups = dict(tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        weight = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(weight, prefix, {"weight": 0}, sharded_offsets, **groups)
