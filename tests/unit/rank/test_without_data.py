"""Widths ranked without data: norms of weights written out part by part, and chance by the seed."""

import torch

from elastic.model.model import ElasticModel
from elastic.rank.importance import make_ranking
from elastic.rank.without_data import magnitude_scores, random_scores
from tests.shapes import UNEVEN as SHAPE
from tests.unit.rank.importance_parent import SPACE


def test_magnitude_is_the_norm_of_the_rows_and_columns_a_part_owns(model: ElasticModel) -> None:
    scores = magnitude_scores(model, SHAPE)
    weights = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    reads = ("in_proj", "linear_qkv", "linear_fc1", "embeddings", "output_layer")  # the stream is their last dimension
    writes = ("out_proj", "linear_proj", "linear_fc2")
    for channel in (0, 23):
        parts = [w[:, channel] for name, w in weights.items() if any(part in name for part in reads)]
        parts += [w[channel] for name, w in weights.items() if any(part in name for part in writes)]
        torch.testing.assert_close(scores.hidden[channel], torch.cat(parts).norm(), rtol=1e-5, atol=0)
    first, second = (weights[f"decoder.layers.4.mlp.linear_fc{number}.weight"] for number in (1, 2))
    torch.testing.assert_close(
        scores.ffn[1], (first.square().sum(1) + second.square().sum(0)).sqrt(), rtol=1e-5, atol=0
    )
    z_x = weights["decoder.layers.3.mixer.in_proj.weight"][:96].view(2, 8, 6, 24)
    taps = weights["decoder.layers.3.mixer.conv1d_weight"][:48].view(8, 6, 4)
    out = weights["decoder.layers.3.mixer.out_proj.weight"].view(24, 8, 6)
    energy = z_x.square().sum((0, 3)) + taps.square().sum(2) + out.square().sum(0)  # [H, P]
    torch.testing.assert_close(scores.mamba_heads(1), energy.sum(1).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.mamba_channels(1), energy.sum(0).sqrt(), rtol=1e-5, atol=0)
    query = weights["decoder.layers.2.self_attention.linear_qkv.weight"].view(2, 5, 8, 24)[:, :3].reshape(6, 8, 24)
    context = weights["decoder.layers.2.self_attention.linear_proj.weight"].view(24, 6, 8)
    expected = (query.square().sum((1, 2)) + context.square().sum((0, 2))).sqrt()
    torch.testing.assert_close(scores.attention_heads[0], expected, rtol=1e-5, atol=0)
    make_ranking(scores, SPACE)


def test_chance_follows_the_seed_and_orders_every_part_once() -> None:
    one, again, other = (make_ranking(random_scores(SHAPE, seed), SPACE) for seed in (1, 1, 2))
    assert one == again
    pairs = ((one.named_orders()[name], order) for name, order in other.named_orders().items() if name != "depth")
    assert sum(a != b for a, b in pairs) > 5, "orders of four and three may agree"
