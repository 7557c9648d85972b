"""Initial parameters depend on (seed, name) alone: every layout starts from the same model."""

import math

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.initialize import initial_tensor, named_global_parameters
from elastic.model.model import build_model
from elastic.model.sharding import shard_tensor
from elastic.space.shape import ModelShape
from elastic.space.space import Space
from elastic.world.groups import Layout
from tests.distributed.harness import run_distributed

SEED, STD = 5, 0.1
SHAPE = ModelShape.uniform(
    "M-*M-", vocab=64, hidden=32, ffn=128, mamba_heads=64, head_channels=4, mamba_groups=2, mamba_state=8,
    conv_kernel=4, attention_heads=8, kv_heads=2, attention_channels=8, tied_embeddings=True,
)  # fmt: skip


def draw(name: str, seed: int = SEED) -> Tensor:
    return initial_tensor(name, SHAPE, seed, STD)


def test_a_name_and_a_seed_fix_the_values() -> None:
    names = [f"decoder.layers.{layer}.mixer.in_proj.weight" for layer in (0, 3)]
    assert torch.equal(draw(names[0]), draw(names[0]))
    assert not torch.equal(draw(names[0]), draw(names[1]))
    assert not torch.equal(draw(names[0]), draw(names[0], seed=SEED + 1))
    before = torch.get_rng_state()
    draw(names[0])
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not touched"


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.word_embeddings.weight", STD),
        ("decoder.layers.0.mixer.in_proj.weight", STD),
        ("decoder.layers.1.mlp.linear_fc1.weight", STD),
        ("decoder.layers.2.self_attention.linear_qkv.weight", STD),
        # What writes to the stream is smaller: five layers add up.
        ("decoder.layers.0.mixer.out_proj.weight", STD / math.sqrt(5)),
        ("decoder.layers.1.mlp.linear_fc2.weight", STD / math.sqrt(5)),
        ("decoder.layers.2.self_attention.linear_proj.weight", STD / math.sqrt(5)),
    ],
)
def test_projections_are_normal(name: str, std: float) -> None:
    values = draw(name)
    assert values.std().item() == pytest.approx(std, rel=0.1) and abs(values.mean().item()) < 0.1 * std


def test_mamba_parameters_follow_mamba_2() -> None:
    a = draw("decoder.layers.0.mixer.A_log").exp()
    assert 1.0 <= a.min() < 3 and 14 < a.max() <= 16.0
    dt = torch.nn.functional.softplus(draw("decoder.layers.0.mixer.dt_bias").double())
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1 * 1.001
    conv = draw("decoder.layers.0.mixer.conv1d_weight")
    assert conv.abs().max() <= 0.5 and conv.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.1)
    for ones in ("mixer.D", "mixer.norm.weight", "norm.weight"):
        assert (draw(f"decoder.layers.0.{ones}") == 1).all()


def _stage(layout: Layout) -> dict[str, Tensor]:
    use_cpu_backend()  # a tied head on another stage is copied through .cuda()
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    model = build_model(Space(SHAPE, {}, lanes=2), layout, seed=SEED, init_std=STD)
    return {name: parameter.detach().clone() for name, parameter in named_global_parameters(model)}


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2)], ids=["one process", "TP2 x PP2"])
def test_pitfall_22_every_layout_starts_from_the_same_model(layout: Layout) -> None:
    """Names are global; a rank's part is the shard of the one full tensor; a tied head equals the embedding."""
    stages = run_distributed(_stage, layout.tensor * layout.pipeline, layout)
    for rank, stage in enumerate(stages):
        for name, values in stage.items():
            expected = shard_tensor(draw(name), name, SHAPE, rank % layout.tensor, layout.tensor)
            assert torch.equal(values, expected), (rank, name)
    layers = [{int(name.split(".")[2]) for name in stage if ".layers." in name} for stage in stages]
    assert set.union(*layers) == set(range(5))
    embedding = "embedding.word_embeddings.weight"
    first_and_last = (stages[0], stages[-1])
    assert all(embedding in stage for stage in first_and_last)
