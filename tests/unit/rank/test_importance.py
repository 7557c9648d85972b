"""Importance scores: eq. 1-4 against plain PyTorch, planted winners found.

Shapes: B batch, S sequence, D hidden, F ffn, G Mamba groups, H heads, P Mamba channels, A attention channels.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elastic.model.forward import Sequences
from elastic.model.model import ElasticModel, build_model
from elastic.rank.depth import rank_layers
from elastic.rank.importance import (
    ScoreCollector,
    Scores,
    best_first,
    collect_scores,
    make_ranking,
)
from elastic.rank.permutation import RankingError, save_ranking
from elastic.space.space import Space
from elastic.world.groups import Layout
from tests.shapes import UNEVEN as SHAPE
from tests.unit.rank.importance_parent import SPACE, top_of


def layer_inputs(model: ElasticModel, batches: list[Tensor]) -> list[Tensor]:
    """Return LN(X) of every layer, the tokens of all batches together [N, D]; the norm is written out."""
    gates = model.decoder.masks.layers(None)
    collected: list[list[Tensor]] = [[] for _ in gates]
    norms = {"M": "norm", "-": "pre_mlp_layernorm", "*": "input_layernorm"}
    with torch.no_grad():
        for tokens in batches:
            x = model.embedding.word_embeddings.weight[tokens].transpose(0, 1)  # [S, B, D]
            for layer_index, (layer, gate) in enumerate(zip(model.decoder.layers, gates, strict=True)):
                weight = layer.get_submodule(norms[SHAPE.pattern.kinds[layer_index]]).weight
                root = (x.pow(2).mean(-1, keepdim=True) + SHAPE.norm_epsilon).sqrt()
                collected[layer_index].append((x / root * weight).flatten(0, 1))
                x = layer(x, gate)
    return [torch.cat(parts).double() for parts in collected]


def weight_of(model: ElasticModel, name: str) -> Tensor:
    return model.get_parameter(f"decoder.layers.{name}").detach().double()


def test_hidden_and_ffn_scores_are_eq_1_and_2(model: ElasticModel, batches: list[Tensor]) -> None:
    scores, inputs = collect_scores(model, SPACE, map(Sequences, batches)), layer_inputs(model, batches)
    assert scores.num_tokens == 80
    torch.testing.assert_close(scores.hidden, sum(x.abs().sum(0) for x in inputs), rtol=1e-5, atol=0)
    for ordinal, layer_index in enumerate((1, 4)):
        neurons = inputs[layer_index] @ weight_of(model, f"{layer_index}.mlp.linear_fc1.weight").T
        torch.testing.assert_close(scores.ffn[ordinal], neurons.abs().sum(0), rtol=1e-5, atol=0)


def test_mamba_scores_are_eq_3_and_4(model: ElasticModel, batches: list[Tensor]) -> None:
    scores, inputs = collect_scores(model, SPACE, map(Sequences, batches)), layer_inputs(model, batches)
    heads, channels = 8, 6
    for ordinal, layer_index in enumerate((0, 3)):
        # Rows of in_proj are [z, x, B, C, dt]; x has one run of P rows per head.
        w_x = weight_of(model, f"{layer_index}.mixer.in_proj.weight")[heads * channels : 2 * heads * channels]
        s = torch.stack(
            [(inputs[layer_index] @ w_x[h * channels : (h + 1) * channels].T).abs().sum(0) for h in range(heads)]
        )
        per_channel = s.pow(2).sum(0).sqrt()
        torch.testing.assert_close(scores.mamba_channels(ordinal), per_channel, rtol=1e-5, atol=0)
        for count in (1, 2, 5):
            expected = s[:, top_of(per_channel, count)].pow(2).sum(1).sqrt()
            found = replace(scores, num_top_channels=count).mamba_heads(ordinal)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_attention_score_is_the_magnitude_of_the_query(model: ElasticModel, batches: list[Tensor]) -> None:
    scores, inputs = collect_scores(model, SPACE, map(Sequences, batches)), layer_inputs(model, batches)
    rows = weight_of(model, "2.self_attention.linear_qkv.weight").view(2, 5, 8, 24)  # per KV group: q q q k v
    expected = [(inputs[2] @ rows[head // 3, head % 3].T).norm(dim=-1).sum() for head in range(6)]
    torch.testing.assert_close(scores.attention_heads[0], torch.stack(expected), rtol=1e-5, atol=0)


def x_rows(model: ElasticModel) -> Tensor:
    """Return the x slice of layer 3's input projection [H, P, D]."""
    return model.get_parameter("decoder.layers.3.mixer.in_proj.weight")[48:96].view(8, 6, 24)


def plant_hidden(model: ElasticModel, channel: int) -> None:
    for layer, norm in zip(model.decoder.layers, ("norm", "pre_mlp_layernorm", "input_layernorm"), strict=False):
        layer.get_submodule(norm).weight[channel] *= 50


def plant_neuron(model: ElasticModel, neuron: int) -> None:
    model.get_parameter("decoder.layers.4.mlp.linear_fc1.weight")[neuron] *= 50


def plant_channel(model: ElasticModel, channel: int) -> None:
    x_rows(model)[:, channel] *= 50


def plant_mamba_head(model: ElasticModel, head: int) -> None:
    """Head of SSM group 1. z and dt of another head, B and C, larger still, must not count."""
    weight = model.get_parameter("decoder.layers.3.mixer.in_proj.weight")
    x_rows(model)[4 + head] *= 50
    weight[:48].view(8, 6, 24)[4 + (head + 1) % 4] *= 500
    weight[96:128] *= 500
    weight[128 + 4 + (head + 1) % 4] *= 500


def plant_query(model: ElasticModel, head: int) -> None:
    """Query head of KV group 1. Keys and values, larger still, must not count."""
    rows = model.get_parameter("decoder.layers.2.self_attention.linear_qkv.weight").view(2, 5, 8, 24)
    rows[1, head] *= 50
    rows[:, 3:] *= 500


@pytest.mark.parametrize(
    ("plant", "order"),
    [
        (plant_hidden, lambda ranking: ranking.hidden),
        (plant_neuron, lambda ranking: ranking.ffn[1]),
        (plant_channel, lambda ranking: ranking.mamba_channels[1]),
        (plant_mamba_head, lambda ranking: ranking.mamba_heads[1][1]),
        (plant_query, lambda ranking: ranking.attention_heads[0][1]),
    ],
)
def test_worst_part_is_ranked_first_once_its_weights_are_scaled_up(
    model: ElasticModel, batches: list[Tensor], plant: Callable, order: Callable
) -> None:
    worst = order(make_ranking(collect_scores(model, SPACE, map(Sequences, batches)), SPACE))[-1]
    with torch.no_grad():
        plant(model, worst)
    assert order(make_ranking(collect_scores(model, SPACE, map(Sequences, batches)), SPACE))[0] == worst


def test_heads_are_ranked_by_the_best_channels_alone() -> None:
    """Eq. 4: a head that is large only in channels outside D_top does not win."""
    s = torch.ones(8, 6, dtype=torch.float64)
    s[:, :2] = 10.0
    s[1, 0] = 11.0
    s[2, 5] = 14.0
    scores = Scores(torch.ones(24), (torch.ones(32),) * 2, (s, s), (torch.ones(6),), num_top_channels=2, num_tokens=1)
    assert make_ranking(scores, SPACE).mamba_heads[0][0] == (1, 0, 2, 3), "the best two"
    assert best_first(replace(scores, num_top_channels=6).mamba_heads(0)[:4]) == (2, 1, 0, 3)


def test_the_best_channels_are_the_smallest_choice_else_half(model: ElasticModel, batches: list[Tensor]) -> None:
    assert collect_scores(model, SPACE, map(Sequences, batches)).num_top_channels == 2
    assert collect_scores(model, Space(SHAPE, {}), map(Sequences, batches)).num_top_channels == 3


def test_equal_scores_keep_their_order_and_scoring_twice_gives_the_same_bits(
    model: ElasticModel, batches: list[Tensor]
) -> None:
    with torch.no_grad():
        rows = model.get_parameter("decoder.layers.1.mlp.linear_fc1.weight")
        rows[20], rows[3], rows[9] = rows[9].clone(), rows[9].clone(), rows[9].clone()
    first, second = (collect_scores(model, SPACE, map(Sequences, batches)) for _ in range(2))
    for name, score in first.tensors().items():
        assert torch.equal(score, second.tensors()[name]), name
    order = make_ranking(first, SPACE).ffn[0]
    place = order.index(3)
    assert order[place : place + 3] == (3, 9, 20)


def test_recomputed_layers_are_observed_once(model: ElasticModel, batches: list[Tensor]) -> None:
    recomputing = build_model(SPACE, Layout(recompute="full"))
    recomputing.load_state_dict(model.state_dict())
    assert recomputing.training
    expected, observed = (collect_scores(parent, SPACE, map(Sequences, batches)) for parent in (model, recomputing))
    assert torch.equal(observed.hidden, expected.hidden)
    with pytest.raises(AssertionError, match="observed twice"):
        recomputing(batches[0], None, ScoreCollector(recomputing, SHAPE))


def test_scores_are_sums_over_batches(model: ElasticModel, batches: list[Tensor]) -> None:
    parts = [collect_scores(model, SPACE, [Sequences(batch)]).tensors() for batch in batches]
    whole = collect_scores(model, SPACE, [Sequences(torch.cat(batches))]).tensors()
    for name in ("hidden", "ffn.0", "mamba_inner.1", "attention_heads.0"):
        torch.testing.assert_close(whole[name], parts[0][name] + parts[1][name], rtol=1e-6, atol=0)


def test_packed_documents_are_scored_as_if_each_were_alone(model: ElasticModel, batches: list[Tensor]) -> None:
    lengths = (1, 8, 11)
    positions = torch.cat([torch.arange(length) for length in lengths]).int().expand(2, -1)
    packed = [Sequences(batch, positions) for batch in batches]
    alone = [Sequences(piece) for batch in batches for piece in batch.split(lengths, dim=1)]
    found, expected = (collect_scores(model, SPACE, of).tensors() for of in (packed, alone))
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0, msg=name)
    depth, expected_depth = (rank_layers(model, SPACE, of, "one_shot") for of in (packed, alone))
    torch.testing.assert_close(depth.tensors(), expected_depth.tensors(), rtol=1e-5, atol=0, equal_nan=True)


def test_scores_survive_the_ranking_file(model: ElasticModel, batches: list[Tensor], tmp_path: Path) -> None:
    scores, depth = (
        collect_scores(model, SPACE, map(Sequences, batches)),
        rank_layers(model, SPACE, map(Sequences, batches), stop_after=2),
    )
    ranking = make_ranking(scores, SPACE, depth)
    save_ranking(tmp_path / "ranking.safetensors", ranking, scores.tensors() | depth.tensors(), {"data": "random"})
    stored = load_file(tmp_path / "ranking.safetensors")
    assert tuple(stored["ranking.depth"].tolist()) == ranking.depth
    assert torch.equal(stored["score.mamba_heads.1"], scores.mamba_heads(1))
    assert stored["score.depth_history"].shape == (2, 5)


def test_unusable_calibration_is_refused(model: ElasticModel, batches: list[Tensor]) -> None:
    with pytest.raises(RankingError, match="0 tokens"):
        collect_scores(model, SPACE, [])
    with pytest.raises(RankingError, match="at least one sequence"):
        rank_layers(model, SPACE, [])
    with pytest.raises(RankingError, match="between 1 and 4"):
        rank_layers(model, SPACE, map(Sequences, batches), stop_after=5)
    with torch.no_grad():
        model.get_parameter("decoder.layers.1.mlp.linear_fc1.weight")[3] = float("inf")
    with pytest.raises(RankingError, match=r"ffn\.0"):
        collect_scores(model, SPACE, map(Sequences, batches))
