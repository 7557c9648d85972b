"""Elastic grouped-query attention without position embedding, its layer, and the PyTorch attention core.

Shapes: S sequence, B batch, D hidden, H query heads, KV key/value heads, A channels of a head, T tokens so far; lower
case = this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import _undo_attention_load_balancing
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from elastic.model.cache import AttentionCache, LayerMemory
from elastic.model.documents import Documents, context_spans
from elastic.model.gated_linear import gated_linear
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
        keys, values = (_whole_sequences(t, self.cp_group).permute(1, 2, 0, 3) for t in (key, value))
        if self.cp_group.size() == 1:
            return _attended(query, keys, values)
        # A chunk sees what is in front of it, and itself causally.
        spans = context_spans(keys.shape[2], self.cp_group.rank(), self.cp_group.size())
        chunks = zip(query.chunk(2), spans, strict=True)
        return torch.cat([_attended(own, keys[:, :, :end], values[:, :, :end]) for own, (_, end) in chunks])


def cached_attention(query: Tensor, key: Tensor, value: Tensor, memory: LayerMemory[AttentionCache]) -> Tensor:
    """Attend the next tokens' queries [S, B, h, A] over their own and all cached keys; returns [S, B, h*A].

    torch's scaled_dot_product_attention on every device: the training kernel of a GPU takes no cache of ours.
    """
    return _attended(query, *memory.cache.append(key, value, memory.tokens), memory.tokens.seen)


def _whole_sequences(tokens: Tensor, cp_group: Any) -> Tensor:
    """Gather keys or values [s, B, kv, A] of every context-parallel rank, in the sequence's order: [S, B, kv, A]."""
    if cp_group.size() == 1:
        return tokens
    gathered = gather_from_sequence_parallel_region(tokens, group=cp_group)
    return _undo_attention_load_balancing(gathered, cp_group.size())


def attention_by_documents(query: Tensor, key: Tensor, value: Tensor, documents: Documents, cp_group: Any) -> Tensor:
    """Attend [S, B, h, A] over [S, B, kv, A] of the own document alone; returns [S, B, h*A], without a mask of pairs.

    Under context parallelism keys and values are gathered: they are few heads, and documents need no even lengths, as
    they would in Transformer Engine's ring. In bf16 on a GPU it is torch's variable-length flash attention.
    """
    flat_query, keys, values = (_rows(t) for t in (query, *(_whole_sequences(t, cp_group) for t in (key, value))))
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in range(8, 257, 8)
    context = (_attended_packed if fits else _attended_in_turn)(flat_query, keys, values, documents)
    return _tokens_first(context, query.shape[1])


def _rows(tokens: Tensor) -> Tensor:
    """Lay [S, B, h, A] out as [B * S, h, A], one sequence after another."""
    return tokens.transpose(0, 1).flatten(0, 1)


def _tokens_first(rows: Tensor, batch: int) -> Tensor:
    """Turn [B * S, ...] back into [S, B, h*A]."""
    return rows.flatten(1).unflatten(0, (batch, -1)).transpose(0, 1).contiguous()


def _attended_in_turn(query: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """Attend piece by piece: query [B * s, h, A], keys and values [B * S, kv, A]; returns [B * s, h*A]."""
    queries = query.unsqueeze(1).split([piece.num_queries for piece in documents.pieces])
    # Split, not sliced: the backward pass is one copy and not a buffer of the whole for each document.
    of_documents = [t.transpose(0, 1).unsqueeze(0).split(documents.lengths, dim=2) for t in (keys, values)]
    found = [
        _attended(own, *(split[piece.document][:, :, : piece.num_keys] for split in of_documents))
        for own, piece in zip(queries, documents.pieces, strict=True)
    ]
    return torch.cat(found).squeeze(1)


def _attended_packed(query: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """Do the same in one kernel; causal is from the last query and key of a piece backwards."""
    packed = documents.packed
    if packed.key_rows is not None:
        keys, values = (t.index_select(0, packed.key_rows) for t in (keys, values))
    ends, most = (packed.query_ends, packed.key_ends), (packed.most_queries, packed.most_keys)
    # What torch.nn.attention.varlen calls, whose own arguments differ between torch's versions.
    context: Tensor = torch.ops.aten._flash_attention_forward(query, keys, values, *ends, *most, 0.0, True, False)[0]
    return context


def _attended(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend the last S of T tokens [S, B, h, A] causally over [B, kv, T, A], or as `mask` says; returns [S, B, h*A].

    `mask` [B, 1, S, T] tells what a query sees.
    """
    q, (length, num_keys) = query.permute(1, 2, 0, 3), (query.shape[0], keys.shape[2])
    if mask is None and 1 < length < num_keys:
        mask = torch.ones(length, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - length)
    grouped, whole = q.shape[1] != keys.shape[1], mask is None and length == num_keys
    context = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=grouped)
    return context.permute(2, 0, 1, 3).flatten(2)


class ElasticSelfAttention(SelfAttention):
    """Query heads are elastic inside each KV group; keys and values stay."""

    def forward_gated(
        self,
        x: Tensor,
        gates: LayerGates,
        observer: LayerObserver | None = None,
        memory: LayerMemory[AttentionCache] | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map [S, B, D] to [S, B, D] under the layer's head gate and the stream's; x goes on where the memory ends."""
        kv, a = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv = self.linear_qkv.forward_cut(x, gates.cut)
        qkv = qkv.view(*qkv.shape[:2], kv, -1, a)  # [S, B, kv, h/kv + 2, A]
        query, key, value = (t.flatten(2, 3) for t in qkv.split([qkv.shape[3] - 2, 1, 1], dim=3))
        if observer is not None:
            observer.query(query)
        if memory is not None:
            context = cached_attention(query, key, value, memory)
        elif documents is not None:
            context = self._by_documents(query, key, value, documents)
        else:
            context = self.core_attention(query, key, value, None, attn_mask_type=self.attn_mask_type)  # [S, B, h*A]
        heads, rows = gates[Axis.ATTENTION_HEAD].vector, gates.output
        if heads is None and rows is None:
            return self.linear_proj.forward_cut(context, gates.cut)
        columns = None if heads is None else heads.unsqueeze(-1).expand(-1, a).flatten()
        return gated_linear(self.linear_proj, context, rows, columns)

    def _by_documents(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """Attend inside documents, with Transformer Engine's packed layout where it is there and holds whole ones."""
        cp_group = self.pg_collection.cp
        if isinstance(self.core_attention, SdpaCoreAttention) or cp_group.size() > 1:
            return attention_by_documents(query, key, value, documents, cp_group)
        packed = documents.packed
        ends, most = packed.query_ends, packed.most_queries
        layout = PackedSeqParams("thd", ends, ends, max_seqlen_q=most, max_seqlen_kv=most)
        rows, mask = (_rows(t) for t in (query, key, value)), self.attn_mask_type
        context = self.core_attention(*rows, None, attn_mask_type=mask, packed_seq_params=layout)
        return _tokens_first(context, query.shape[1])


class ElasticAttentionLayer(ElasticLayer, TransformerLayer):
    """x + g_depth g_hidden Attention(norm(x))."""

    norm_and_function = ("input_layernorm", "self_attention")

    def add(self, x: Tensor, y: Tensor, gates: LayerGates) -> Tensor:
        """Add what linear_proj has multiplied by the gates of the stream."""
        return self.elementwise.residual(x, y, None, None)
