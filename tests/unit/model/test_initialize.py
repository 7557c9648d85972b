"""Initial parameters depend on (seed, name) alone (at every layout: tests/distributed/test_initialize.py)."""

import math

import pytest
import torch
from torch import Tensor

from elastic.model.initialize import initial_tensor
from elastic.space.shape import ModelShape

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
