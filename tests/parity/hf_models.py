"""Stock transformers models with random weights in every parameter: the independent implementation of these tests."""

import math

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, NemotronHConfig, PreTrainedModel

from elastic.hf.card import CardInfo
from elastic.hf.config import hf_config
from elastic.hf.export_settings import HfSettings
from elastic.hf.names import to_hf
from elastic.rank.slicing import TensorSource
from elastic.space.shape import ModelShape, Subnet


def tiny(pattern: str, **changes: int | bool | float) -> ModelShape:
    """Return a small shape; `changes` replace its sizes."""
    sizes: dict = {
        "vocab": 40,
        "hidden": 32,
        "ffn": 48,
        "mamba_heads": 8,
        "head_channels": 6,
        "mamba_groups": 2,
        "mamba_state": 8,
        "conv_kernel": 4,
        "attention_heads": 6,
        "kv_heads": 2,
        "attention_channels": 8,
    }
    return ModelShape.uniform(pattern, **(sizes | changes))


SHAPES = {
    "groups 1, odd head channels": tiny("M-M*-", mamba_groups=1, mamba_heads=3, head_channels=5),
    "groups 2, tied head": tiny("M*-M-", tied_embeddings=True),
    "groups 4, five queries per KV head": tiny("*M-M", mamba_groups=4, attention_heads=10),
    "groups 8, twelve layers": tiny("M-M*-M-M*-M-", mamba_groups=8, mamba_heads=16, head_channels=4),
    "no attention, long convolution": tiny("M-M", conv_kernel=6, mamba_state=5),
    "no Mamba, one KV head, large epsilon": tiny("*-*-", kv_heads=1, attention_heads=3, norm_epsilon=1e-2),
}


def stock_config(shape: ModelShape, **changes: float) -> NemotronHConfig:
    """Return the stock config of `shape`; initialisation from a config alone needs time_step_min above 0."""
    return NemotronHConfig(**(hf_config(shape, HfSettings(), torch.float32) | {"time_step_min": 0.001} | changes))


def stock_model(shape: ModelShape, seed: int = 0) -> PreTrainedModel:
    """Build a stock fp32 model in which no parameter keeps its trivial initial value and dt is not clamped."""
    model = AutoModelForCausalLM.from_config(stock_config(shape)).eval()
    model.config.time_step_min = 0.0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(name, parameter, generator))
        if shape.tied_embeddings:
            model.lm_head.weight.copy_(model.model.embeddings.weight)
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def _random(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("A_log"):
        return noise.abs() + 0.2
    if name.endswith("dt_bias"):
        return noise * 2 - 3
    if parameter.dim() == 1:
        return 1 + 0.3 * noise
    if "embeddings" in name:
        return noise
    return noise / math.sqrt(parameter.shape[-1])


def card_of(shape: ModelShape) -> CardInfo:
    """Return the card of a model that nobody cut."""
    return CardInfo("test", shape, Subnet.full(shape))


def stock_model_of(source: TensorSource, shape: ModelShape) -> PreTrainedModel:
    """Build a stock model from Megatron-Core tensors through the name table."""
    model = stock_model(shape)
    state = {name.replace("backbone.", "model."): tensor for name, tensor in to_hf(source, shape)}
    model.load_state_dict(state, strict=True)
    return model


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Run tokens [B, S] without a cache; logits [B, S, V]."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return the largest difference over the largest reference value."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Tell whether two sets of tensors are the same bits, types included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
