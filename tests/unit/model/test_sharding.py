"""Parameters split over tensor-parallel ranks and joined again, block by block."""

import pytest
import torch

from elastic.model.sharding import shard_tensor, sharded_dim, unshard_tensors
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape

SHAPE = ModelShape.uniform(
    "M*-", vocab=16, hidden=6, ffn=8, mamba_heads=8, head_channels=3, mamba_groups=4, mamba_state=2, conv_kernel=4,
    attention_heads=12, kv_heads=4, attention_channels=2,
)  # fmt: skip
SIZES = {
    "embedding.word_embeddings.weight": (16, 6),
    "output_layer.weight": (16, 6),
    "decoder.final_norm.weight": (6,),
    "decoder.layers.0.norm.weight": (6,),
    "decoder.layers.0.mixer.in_proj.weight": (24 + 24 + 8 + 8 + 8, 6),
    "decoder.layers.0.mixer.conv1d_weight": (24 + 8 + 8, 1, 4),
    "decoder.layers.0.mixer.conv1d_bias": (24 + 8 + 8,),
    "decoder.layers.0.mixer.A_log": (8,),
    "decoder.layers.0.mixer.D": (8,),
    "decoder.layers.0.mixer.dt_bias": (8,),
    "decoder.layers.0.mixer.norm.weight": (24,),
    "decoder.layers.0.mixer.out_proj.weight": (6, 24),
    "decoder.layers.1.input_layernorm.weight": (6,),
    "decoder.layers.1.self_attention.linear_qkv.weight": (24 + 8 + 8, 6),
    "decoder.layers.1.self_attention.linear_proj.weight": (6, 24),
    "decoder.layers.2.pre_mlp_layernorm.weight": (6,),
    "decoder.layers.2.mlp.linear_fc1.weight": (8, 6),
    "decoder.layers.2.mlp.linear_fc2.weight": (6, 8),
}
REPLICATED = {name for name, size in SIZES.items() if size == (6,)}


def numbered(name: str) -> torch.Tensor:
    size = parameter_size(name, SHAPE)
    return torch.arange(torch.Size(size).numel()).view(size)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_facts(name: str) -> None:
    assert parameter_size(name, SHAPE) == SIZES[name]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", SIZES)
def test_shards_join_to_the_full_parameter(name: str, tp_size: int) -> None:
    full = numbered(name)
    shards = [shard_tensor(full, name, SHAPE, rank, tp_size) for rank in range(tp_size)]
    assert torch.equal(unshard_tensors(shards, name, SHAPE), full)
    if name in REPLICATED:
        assert sharded_dim(name) is None and all(shard is full for shard in shards)
    else:
        assert all(shard.numel() * tp_size == full.numel() for shard in shards)


def test_pitfall_19_each_block_is_split_on_its_own() -> None:
    """Rank 1 of 2 holds the second half of z, x, B, C and dt each, not the second half of the rows."""
    name = "decoder.layers.0.mixer.in_proj.weight"
    rows = shard_tensor(numbered(name), name, SHAPE, 1, 2)[:, 0] // 6
    expected = [*range(12, 24), *range(36, 48), *range(52, 56), *range(60, 64), *range(68, 72)]
    assert rows.tolist() == expected


def test_query_heads_stay_with_their_key_and_value() -> None:
    """Rank 1 of 4 holds the rows of KV head 1: three query heads, the key, the value, two channels each."""
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    rows = shard_tensor(numbered(name), name, SHAPE, 1, 4)[:, 0] // 6
    assert rows.tolist() == list(range(10, 20))
    columns = shard_tensor(numbered("decoder.layers.1.self_attention.linear_proj.weight"),
                           "decoder.layers.1.self_attention.linear_proj.weight", SHAPE, 1, 4)[0]  # fmt: skip
    assert columns.tolist() == list(range(6, 12))


def test_unknown_parameter_is_refused() -> None:
    with pytest.raises(KeyError):
        parameter_size("decoder.layers.0.mixer.bias", SHAPE)
