"""Elastic grouped-query attention without position embedding, its layer, and the PyTorch attention core.

Shapes: S sequence, B batch, D hidden, H query heads, KV key/value heads, A channels of a head, T tokens so far; lower
case = this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_context_parallel import _undo_attention_load_balancing
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from elastic.model.cache import AttentionCache
from elastic.model.masks import ElasticLayer, LayerGates
from elastic.model.observe import LayerObserver
from elastic.space.axes import Axis


class SdpaCoreAttention(MegatronModule):
    """Causal attention with torch's scaled_dot_product_attention; context parallel by gathering keys and values.

    Under context parallelism a rank holds chunks r and 2*cp-1-r of the sequence (Megatron-Core's load balancing).
    """

    def __init__(self, config: TransformerConfig, *_args: Any, pg_collection: Any = None, **_kwargs: Any) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp
        if self.cp_group.size() > 1 and not config.use_cpu_initialization:
            rule = "must be 1 on GPUs without Transformer Engine, whose attention alone spares a mask of all pairs"
            remedy = "install transformer-engine, or set parallel.context=1 and parallel.tensor higher"
            raise ValueError(f"parallel.context = {self.cp_group.size()}: {rule}; {remedy}")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend [S, B, h, A] over [S, B, kv, A]; returns [S, B, h*A]. Packed sequences are refused."""
        if packed_seq_params is not None or attention_mask is not None or attention_bias is not None:
            raise ValueError("SdpaCoreAttention is causal over whole sequences: no mask, bias or packed sequences")
        size, rank, half = self.cp_group.size(), self.cp_group.rank(), query.shape[0] // 2
        if size == 1:
            return _attended(query, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))
        gathered = (gather_from_sequence_parallel_region(t, group=self.cp_group) for t in (key, value))
        keys, values = (_undo_attention_load_balancing(t, size).permute(1, 2, 0, 3) for t in gathered)
        # A chunk sees what is in front of it, and itself causally.
        ends = [(chunk + 1) * half for chunk in (rank, 2 * size - 1 - rank)]
        chunks = zip(query.split(half), ends, strict=True)
        return torch.cat([_attended(own, keys[:, :, :end], values[:, :, :end]) for own, end in chunks])


def cached_attention(query: Tensor, key: Tensor, value: Tensor, cache: AttentionCache) -> Tensor:
    """Attend the next tokens' queries [S, B, h, A] over their own and all cached keys; returns [S, B, h*A].

    torch's scaled_dot_product_attention on every device: the training kernel of a GPU takes no cache of ours.
    """
    return _attended(query, *cache.append(key, value))


def _attended(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend the last S of T tokens [S, B, h, A] causally over [B, kv, T, A]; returns [S, B, h*A]."""
    q, (length, num_keys) = query.permute(1, 2, 0, 3), (query.shape[0], keys.shape[2])
    mask = None
    if 1 < length < num_keys:
        mask = torch.ones(length, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - length)
    grouped, whole = q.shape[1] != keys.shape[1], length == num_keys
    context = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=grouped)
    return context.permute(2, 0, 1, 3).flatten(2)


class ElasticSelfAttention(SelfAttention):
    """Query heads are elastic inside each KV group; keys and values stay."""

    def forward_gated(
        self, x: Tensor, gates: LayerGates, observer: LayerObserver | None = None, cache: AttentionCache | None = None
    ) -> Tensor:
        """Map [S, B, D] to [S, B, D] under the layer's head gate; x goes on where a cache ends."""
        kv, a = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv = self.linear_qkv.forward_cut(x, gates.cut)
        qkv = qkv.view(*qkv.shape[:2], kv, -1, a)  # [S, B, kv, h/kv + 2, A]
        query, key, value = (t.flatten(2, 3) for t in qkv.split([qkv.shape[3] - 2, 1, 1], dim=3))
        if observer is not None:
            observer.query(query)
        if cache is None:
            context = self.core_attention(query, key, value, None, attn_mask_type=self.attn_mask_type)  # [S, B, h*A]
        else:
            context = cached_attention(query, key, value, cache)
        heads = gates[Axis.ATTENTION_HEAD]
        if heads.vector is not None:
            context = heads.apply(context.unflatten(-1, (-1, a)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)
        return self.linear_proj.forward_cut(context, gates.cut)


class ElasticAttentionLayer(ElasticLayer, TransformerLayer):
    """x + g_depth g_hidden Attention(norm(x))."""

    norm_and_function = ("input_layernorm", "self_attention")
