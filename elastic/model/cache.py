"""What the layers of one sequence remember while it is decoded: an argument of the call, never a slot on a module.

Shapes: B batch, S new tokens, T tokens so far, KV key/value heads, A channels of a head, H Mamba heads, P head
channels, N state, k convolution taps; lower case = this tensor-parallel rank's shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.space.axes import LayerKind
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut
from elastic.space.shape import ModelShape, Subnet


@dataclass
class AttentionCache:
    """Keys and values [B, kv, capacity, A], of which the first `num_tokens` are filled."""

    keys: Tensor
    values: Tensor
    num_tokens: int = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the next tokens' key and value [S, B, kv, A]; returns all so far, [B, kv, T, A] each, as views."""
        end = self.num_tokens + key.shape[0]
        assert end <= self.keys.shape[2], f"{end} tokens in a cache for {self.keys.shape[2]}"
        for kept, new in ((self.keys, key), (self.values, value)):
            kept[:, :, self.num_tokens : end] = new.permute(1, 2, 0, 3)
        self.num_tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class MambaCache:
    """The last inputs of the convolution [B, k-1, x B C] and the state [B, h, P, N], at least fp32."""

    conv_inputs: Tensor
    state: Tensor


LayerCache = AttentionCache | MambaCache


ModelCache = Mapping[int, LayerCache]  # of the layers a subnet keeps, by global index; an MLP remembers nothing


def empty_cache(
    parent: ModelShape,
    subnet: Subnet,
    capacity_tokens: int,
    *,
    batch: int = 1,
    tensor_parallel: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> ModelCache:
    """Make room for `capacity_tokens` tokens of `batch` sequences in the layers, heads and channels `subnet` keeps."""
    layers: dict[int, LayerCache] = {}
    for layer_index in subnet.kept_layers:
        kind = parent.pattern.kinds[layer_index]
        if kind is LayerKind.ATTENTION:
            size = (batch, parent.kv_heads // tensor_parallel, capacity_tokens, parent.attention_channels)
            keys, values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
            layers[layer_index] = AttentionCache(keys, values)
        elif kind is LayerKind.MAMBA:
            widths = subnet.layer_widths(parent, layer_index)
            cut = Cut.of_layer(parent, layer_index, widths, tensor_parallel=tensor_parallel)
            conv_channels, heads = (cut.grid(dim).kept_size for dim in (DimKind.CONV, DimKind.MAMBA_HEAD))
            wide = torch.promote_types(dtype, torch.float32)  # the state sums over the whole sequence
            layers[layer_index] = MambaCache(
                torch.zeros(batch, parent.conv_kernel - 1, conv_channels, dtype=dtype, device=device),
                torch.zeros(batch, heads, subnet.head_channels, parent.mamba_state, dtype=wide, device=device),
            )
    return layers
