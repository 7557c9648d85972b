"""After the permutation, the best parts come first, in every lane, group and head, for any number of lanes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from elastic.rank.permutation import (
    Ranking,
    RankingError,
    permute_parameter,
    save_ranking,
)
from elastic.space.layers import LAYER_PARAMETERS, parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape, Subnet
from tests.nested import permuted_tensors, submodel_tensors

PARENT = ModelShape.uniform(
    "M-*-M*",
    vocab=10,
    hidden=12,
    ffn=16,
    mamba_heads=6,
    head_channels=5,
    mamba_groups=2,
    mamba_state=3,
    conv_kernel=4,
    attention_heads=6,
    kv_heads=2,
    attention_channels=3,
)


def random_order(length: int) -> tuple[int, ...]:
    return tuple(torch.randperm(length).tolist())


def random_ranking(parent: ModelShape) -> Ranking:
    per_group, per_kv = 6 // parent.mamba_groups, 6 // parent.kv_heads
    return Ranking(
        hidden=random_order(parent.hidden),
        ffn=tuple(random_order(width) for width in parent.ffn),
        mamba_heads=tuple(tuple(random_order(per_group) for _ in range(parent.mamba_groups)) for _ in range(2)),
        mamba_channels=tuple(random_order(parent.head_channels) for _ in range(2)),
        attention_heads=tuple(tuple(random_order(per_kv) for _ in range(parent.kv_heads)) for _ in range(2)),
        depth=random_order(len(parent.pattern)),
    )


def coordinates(parent: ModelShape) -> dict[str, torch.Tensor]:
    """Name each row of each parameter by what it belongs to: the same number on the first dimension's rows."""
    tensors = {}
    for name in parameter_names(parent):
        size = parameter_size(name, parent)
        rows = torch.arange(size[0]).view(-1, *[1] * (len(size) - 1))
        tensors[name] = rows.expand(size).clone()
    return tensors


def first_column(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(tensor.shape[0], -1)[:, 0].tolist()


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_every_width_keeps_the_best_neurons(lanes: int) -> None:
    ranking = random_ranking(PARENT)
    permuted = permuted_tensors(coordinates(PARENT), PARENT, ranking, lanes)
    for width in range(lanes, 17, lanes):
        subnet = Subnet(**(vars(Subnet.full(PARENT)) | {"ffn": (width, width)}))
        cut = submodel_tensors(permuted, PARENT, subnet, lanes)
        for ordinal, layer in enumerate((1, 3)):
            kept = first_column(cut[f"decoder.layers.{layer}.mlp.linear_fc1.weight"])
            assert set(kept) == set(ranking.ffn[ordinal][:width])


def test_every_width_keeps_the_best_heads_of_each_group_and_the_best_channels() -> None:
    ranking = random_ranking(PARENT)
    permuted = permuted_tensors(coordinates(PARENT), PARENT, ranking, 2)
    for heads in (1, 2, 3):
        for channels in (1, 3, 5):
            changes = {"mamba_heads": (2 * heads, 2 * heads), "head_channels": channels}
            cut = submodel_tensors(permuted, PARENT, Subnet(**(vars(Subnet.full(PARENT)) | changes)), 2)
            for ordinal, layer in enumerate((0, 4)):
                best = {group * 3 + head for group in range(2) for head in ranking.mamba_heads[ordinal][group][:heads]}
                assert set(first_column(cut[f"decoder.layers.{layer}.mixer.dt_bias"])) == best
                inner = {head * 5 + channel for head in best for channel in ranking.mamba_channels[ordinal][:channels]}
                assert set(first_column(cut[f"decoder.layers.{layer}.mixer.norm.weight"])) == inner
                state = set(range(60, 72))
                expected = inner | {30 + row for row in inner} | state | {72 + head for head in best}
                assert set(first_column(cut[f"decoder.layers.{layer}.mixer.in_proj.weight"])) == expected


def test_every_width_keeps_the_best_query_heads_and_all_keys_and_values() -> None:
    ranking = random_ranking(PARENT)
    permuted = permuted_tensors(coordinates(PARENT), PARENT, ranking, 2)
    for heads in (1, 2, 3):
        subnet = Subnet(**(vars(Subnet.full(PARENT)) | {"attention_heads": (2 * heads, 2 * heads)}))
        cut = submodel_tensors(permuted, PARENT, subnet, 2)
        for ordinal, layer in enumerate((2, 5)):
            expected = set()
            for group in range(2):
                slots = [*ranking.attention_heads[ordinal][group][:heads], 3, 4]  # 3 is the key, 4 the value
                expected |= {group * 15 + slot * 3 + channel for slot in slots for channel in range(3)}
            assert set(first_column(cut[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"])) == expected


def test_hidden_order_is_the_same_on_the_whole_residual_stream() -> None:
    ranking = random_ranking(PARENT)
    permuted = permuted_tensors(coordinates(PARENT), PARENT, ranking, 2)
    outputs = ("norm.weight", "out_proj.weight", "layernorm.weight", "linear_proj.weight", "linear_fc2.weight")
    checked = [name for name in permuted if name.endswith(outputs) and "mixer.norm" not in name]
    assert len(checked) == 2 * len(PARENT.pattern) + 1
    for name in checked:
        assert tuple(first_column(permuted[name])) == ranking.hidden
    columns = torch.arange(12).expand(10, 12)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert tuple(permute_parameter(columns, name, PARENT, ranking, 2)[0].tolist()) == ranking.hidden


def test_rows_and_columns_that_meet_move_together() -> None:
    ranking = random_ranking(PARENT)
    pairs = {
        "mlp.linear_fc2.weight": ("mlp.linear_fc1.weight", 1),
        "mixer.out_proj.weight": ("mixer.norm.weight", 0),
    }
    for reader_name, (writer_name, layer) in pairs.items():
        name, other = f"decoder.layers.{layer}.{reader_name}", f"decoder.layers.{layer}.{writer_name}"
        inner = parameter_size(name, PARENT)[1]
        columns = permute_parameter(torch.arange(inner).expand(12, inner), name, PARENT, ranking, 4)
        assert columns[0].tolist() == first_column(
            permute_parameter(coordinates(PARENT)[other], other, PARENT, ranking, 4)
        )


def test_rank_r_sits_in_lane_r_mod_lanes() -> None:
    ranking, name = random_ranking(PARENT), "decoder.layers.3.mlp.linear_fc1.weight"
    rows = coordinates(PARENT)[name]
    dealt = permute_parameter(rows, name, PARENT, ranking, 8)[:, 0].view(8, 2)
    assert all(dealt[rank % 8, rank // 8] == neuron for rank, neuron in enumerate(ranking.ffn[1]))
    with pytest.raises(RankingError, match="ffn = 16 must be a multiple of lanes = 5"):
        permute_parameter(rows, name, PARENT, ranking, 5)


def test_identity_with_one_lane_changes_nothing() -> None:
    tensors = coordinates(PARENT)
    permuted = permuted_tensors(tensors, PARENT, Ranking.identity(PARENT), 1)
    assert permuted.keys() == tensors.keys()
    assert all(torch.equal(permuted[name], tensors[name]) for name in tensors)
    assert len({name.split(".", 3)[3] for name in tensors if "layers" in name}) == len(LAYER_PARAMETERS)


def test_a_ranking_that_does_not_fit_lists_every_problem() -> None:
    good = vars(Ranking.identity(PARENT))
    bad = good | {
        "hidden": (0,) * 12,
        "ffn": good["ffn"][:1],
        "mamba_heads": (((0, 1, 2), (0, 1)), good["mamba_heads"][1]),
        "depth": (*range(6), 6),
    }
    with pytest.raises(RankingError) as caught:
        Ranking(**bad).check(PARENT)
    for part in ("hidden must order 0..11 once", "ffn.1 is missing", "mamba_heads.0.1 must", "depth must order 0..5"):
        assert part in str(caught.value)
    assert "mamba_heads.0.0" not in str(caught.value)


def test_a_ranking_file_holds_orders_scores_and_provenance(tmp_path: Path) -> None:
    path, ranking = tmp_path / "deep" / "ranking.safetensors", random_ranking(PARENT)
    scores = {"hidden": torch.rand(12), "ffn.0": torch.rand(16)}
    provenance = {"data": "the calibration set", "tokens": "8388608"}
    save_ranking(path, ranking, scores, provenance)
    stored = load_file(path)
    orders = {name: tuple(tensor.tolist()) for name, tensor in stored.items() if name.startswith("ranking.")}
    assert orders["ranking.hidden"] == ranking.hidden and orders["ranking.depth"] == ranking.depth
    assert orders["ranking.ffn.1"] == ranking.ffn[1] and orders["ranking.mamba_channels.0"] == ranking.mamba_channels[0]
    assert orders["ranking.attention_heads.0.1"] == ranking.attention_heads[0][1]
    assert all(torch.equal(stored[f"score.{name}"], score) for name, score in scores.items())
    assert len(stored) == len(orders) + len(scores)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == provenance
    assert [file.name for file in path.parent.iterdir()] == [path.name], "something was left beside the file"
    with pytest.raises(RankingError, match="exists"):
        save_ranking(path, Ranking.identity(PARENT), {}, {})
    assert tuple(load_file(path)["ranking.hidden"].tolist()) == ranking.hidden


def test_pitfall_11_absent_layer_kinds_have_no_orders(tmp_path: Path) -> None:
    parent = ModelShape.uniform(
        "--",
        ffn=8,
        mamba_heads=2,
        attention_heads=2,
        **{
            field: getattr(PARENT, field)
            for field in (
                "vocab",
                "hidden",
                "head_channels",
                "mamba_groups",
                "mamba_state",
                "conv_kernel",
                "kv_heads",
                "attention_channels",
            )
        },
    )
    ranking = Ranking.identity(parent)
    assert (ranking.mamba_heads, ranking.mamba_channels, ranking.attention_heads) == ((), (), ())
    ranking.check(parent)
    save_ranking(tmp_path / "ranking", ranking, {}, {})
    assert load_file(tmp_path / "ranking").keys() == {
        "ranking.hidden",
        "ranking.ffn.0",
        "ranking.ffn.1",
        "ranking.depth",
    }
