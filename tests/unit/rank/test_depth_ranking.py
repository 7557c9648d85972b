"""Layers ranked by what the logits lose without them: eq. 5 against plain PyTorch, both methods."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elastic.model.forward import Sequences
from elastic.model.model import ElasticModel, build_model
from elastic.rank.depth import rank_by_cosine, rank_layers
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import Layout
from tests.shapes import UNEVEN as SHAPE
from tests.unit.rank.importance_parent import SPACE, top_of


def logits(model: ElasticModel, tokens: Tensor, kept_layers: tuple[int, ...] | None = None) -> Tensor:
    gates = None if kept_layers is None else Gates.slice(replace(Subnet.full(SHAPE), kept_layers=kept_layers))
    with torch.no_grad():
        return (model(tokens, gates) @ model.head_weight().T).double()


def test_layer_scores_are_eq_5_on_the_logits(model: ElasticModel, batches: list[Tensor]) -> None:
    full = torch.cat([logits(model, batch) for batch in batches], dim=1)

    def change(kept: tuple[int, ...]) -> float:
        without = torch.cat([logits(model, batch, kept) for batch in batches], dim=1)
        return float((full - without).pow(2).sum() / full.pow(2).sum())

    depth = rank_layers(model, SPACE, map(Sequences, batches))
    assert len(depth.history) == 4, "depth is not elastic in this space: all but one layer are removed"
    present = list(range(5))
    for scores in depth.history:
        expected = {layer: change(tuple(other for other in present if other != layer)) for layer in present}
        assert scores == pytest.approx(expected, rel=1e-4)
        present.remove(min(expected, key=lambda layer: expected[layer]))
    assert depth.order[0] == present[0]
    one_shot = rank_layers(model, SPACE, map(Sequences, batches), "one_shot")
    assert one_shot.history == depth.history[:1]
    assert list(one_shot.order) == top_of(torch.tensor(one_shot.scores), 5)


@pytest.mark.parametrize("method", ["iterative", "one_shot"])
@pytest.mark.parametrize(
    ("layer_index", "projection"), [(0, "mixer.out_proj"), (2, "self_attention.linear_proj"), (4, "mlp.linear_fc2")]
)
def test_layer_that_adds_nothing_is_ranked_last(
    model: ElasticModel, batches: list[Tensor], method: str, layer_index: int, projection: str
) -> None:
    with torch.no_grad():
        model.get_parameter(f"decoder.layers.{layer_index}.{projection}.weight").zero_()
    depth = rank_layers(model, SPACE, map(Sequences, batches), method)
    assert depth.scores[layer_index] == 0.0
    assert depth.order[-1] == layer_index
    assert min(score for index, score in enumerate(depth.scores) if index != layer_index) > 0.0


def test_cosine_scores_are_the_mean_turn_of_the_stream(model: ElasticModel, batches: list[Tensor]) -> None:
    turned = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        model.get_parameter("decoder.layers.3.mixer.out_proj.weight").zero_()  # adds nothing
        for tokens in batches:
            x = model.embedding.word_embeddings.weight[tokens].transpose(0, 1)  # [S, B, D]
            for index, (layer, gate) in enumerate(
                zip(model.decoder.layers, model.decoder.masks.layers(None), strict=True)
            ):
                before, x = x.double(), layer(x, gate)
                cosine = (before * x.double()).sum(-1) / (before.norm(dim=-1) * x.double().norm(dim=-1))
                turned[index] += (1 - cosine).sum() / 80
    depth = rank_by_cosine(model, map(Sequences, batches))
    assert depth.scores == pytest.approx(turned.tolist(), rel=1e-5, abs=1e-7)
    assert list(depth.order) == top_of(turned, 5) and depth.order[-1] == 3
    with pytest.raises(ValueError, match="no calibration tokens"):
        rank_by_cosine(model, [])


def test_removal_stops_at_the_smallest_depth(model: ElasticModel, batches: list[Tensor]) -> None:
    space, told = Space(SHAPE, {Axis.DEPTH: AxisChoices((5, 4, 3))}), []
    depth = rank_layers(model, space, map(Sequences, batches), progress=lambda done, total: told.append((done, total)))
    assert [len(scores) for scores in depth.history] == [5, 4]
    assert told == [(done, 9) for done in range(1, 10)]
    whole = rank_layers(model, SPACE, map(Sequences, batches))
    assert depth.order[3:] == whole.order[3:], "the layers that any depth may drop"
    last = depth.history[-1]
    kept = [layer for layer in last if layer != depth.order[3]]
    assert list(depth.order[:3]) == sorted(kept, key=lambda layer: -last[layer])


@pytest.mark.usefixtures("one_process")
def test_iterative_keeps_one_of_two_duplicates_that_one_shot_drops_both() -> None:
    """Layer 0 turns channel 0 of the stream around; layers 1 and 2 are the same and each alone outweighs the rest.

    Losing either of the two hardly changes direction or logits, losing both changes everything.
    """
    shape = ModelShape.uniform(
        "---",
        ffn=16,
        mamba_heads=2,
        attention_heads=2,
        vocab=48,
        hidden=16,
        head_channels=6,
        mamba_groups=2,
        mamba_state=8,
        conv_kernel=4,
        kv_heads=2,
        attention_channels=8,
    )
    space = Space(shape, {})
    model = build_model(space, Layout())
    with torch.no_grad():
        model.embedding.word_embeddings.weight.mul_(0.1)[:, :2] += torch.tensor([-3.0, 1.0])
        model.output_layer.weight.normal_()[:, [1, *range(3, 16)]] = 0.0
        for layer_index, reads, writes, amount in ((0, [1], 0, 4.0), (1, [1, 2], 2, 10.0), (2, [1, 2], 2, 10.0)):
            first, second = (
                model.get_parameter(f"decoder.layers.{layer_index}.mlp.linear_fc{n}.weight").zero_() for n in (1, 2)
            )
            first[0, reads] = 1.0
            # LN(x)_1^2 is 16/10 at layer 0; 16/2 once layer 0 has made channels 0 and 1 equal in size.
            second[writes, 0] = amount / 1.6
    tokens = [torch.randint(48, (2, 8), generator=torch.Generator().manual_seed(3))]
    one_shot, iterative = (
        rank_layers(model, space, map(Sequences, tokens), "one_shot"),
        rank_layers(model, space, map(Sequences, tokens)),
    )
    assert one_shot.order[0] == 0, one_shot
    assert iterative.order[1] == 0, iterative
    assert iterative.order[0] in (1, 2) and iterative.order[2] in (1, 2)
