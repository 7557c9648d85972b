"""Write `config.json` of stock `nemotron_h`, by the export rules of docs/method.md 3; `config_read` reads it back."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from elastic.hf.export_settings import DTYPE_NAMES, HfSettings
from elastic.space.axes import LayerKind
from elastic.space.shape import ModelShape

# The first stock transformers that is right, by running one set of exports under each (300 tokens, logits against this
# project's): 5.12.0, 5.13.1 and 5.14.0 are wrong beyond the first 128 tokens where Mamba's kernels are not installed
# (differences of 0.03 to 0.9), 5.14.0 fails in models with attention, before 5.10 dense layers do not load; 5.15.0,
# 5.15.1, 5.16.1, 5.17.0, 5.18.0, 5.19.0, 5.23.0 and 5.24.0 agree to 4e-6. pyproject.toml asks for the same.
TRANSFORMERS, TRANSFORMERS_TRIED = "5.15", "5.24"
STOCK_VERSIONS = (
    f"Needs transformers {TRANSFORMERS} or newer (tried up to {TRANSFORMERS_TRIED}): without Mamba's kernels older "
    f"ones are wrong beyond 128 tokens."
)
MODEL: dict[str, Any] = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}
# Stock keys whose only value this project's layers compute; absent keys have this value by default.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "sliding_window": None,
    "use_bias": False,
    "use_conv_bias": True,
}
# Keys that do not touch the function of loaded weights and travel from a source's config to an export's, with the
# value that is written when the source has none (stock code's default).
CARRIED: dict[str, Any] = {
    # Nobody computes with it (inner size = mamba_num_heads * mamba_head_dim); older readers want it present.
    "expand": 2,
    "initializer_range": 0.02,
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "time_step_floor": 1e-4,
    "time_step_max": 0.1,
    "use_cache": True,
}
# Stock code clamps dt from below at time_step_min, which training never did, and takes its logarithm when it draws
# weights: the smallest value that does neither harm (softplus reaches it at -46, where exp(dt A) is 1 in any format).
# Engines that read time_step_limit are told that there is none.
TIME_STEPS: dict[str, Any] = {"time_step_min": 1e-20, "time_step_limit": [0.0, math.inf]}
# The same for keys that are written only if the source has them, with their type.
CARRIED_IF_GIVEN: dict[str, type] = {"mamba_ssm_cache_dtype": str, "time_step_rank": int, "use_mamba_kernels": bool}
# Sizes: stock key -> field of ModelShape.
SIZES = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "mamba_head_dim": "head_channels",
    "n_groups": "mamba_groups",
    "ssm_state_size": "mamba_state",
    "conv_kernel": "conv_kernel",
    "num_key_value_heads": "kv_heads",
    "head_dim": "attention_channels",
}
# Widths, one for all layers of a kind: stock key, field of ModelShape, and the size that stands for the width of a kind
# without layers ("": 0). Other such widths size nothing, and travel so that a config stays equal.
WIDTHS = {
    LayerKind.MLP: ("intermediate_size", "ffn", ""),
    LayerKind.MAMBA: ("mamba_num_heads", "mamba_heads", "n_groups"),
    LayerKind.ATTENTION: ("num_attention_heads", "attention_heads", "num_key_value_heads"),
}


class ExportError(ValueError):
    """A model or folder that cannot be exported; the message says what to change."""


def export_shape(shape: ModelShape) -> ModelShape:
    """Return the uniform shape a stock config can say: FFN and attention padded to their widest layer.

    Raises ExportError if Mamba widths differ: their gated group norm divides by the width, padding would change it.
    """
    if len(set(shape.mamba_heads)) > 1:
        layers = shape.pattern.layers_of(LayerKind.MAMBA)
        widths = ", ".join(f"layer {layer}: {width}" for layer, width in zip(layers, shape.mamba_heads, strict=True))
        raise ExportError(
            f"Mamba heads differ between layers ({widths}). A stock folder has one number for all, and padding is not "
            f"exact under the gated group norm; train with a homogeneous mamba_head axis (per_layer: false)"
        )
    ffn, attention_heads = ((max(widths, default=0),) * len(widths) for widths in (shape.ffn, shape.attention_heads))
    return replace(shape, ffn=ffn, attention_heads=attention_heads)


def export_warnings(shape: ModelShape, tensor_parallel: int = 1) -> list[str]:
    """List the sizes that stock code computes correctly but GPU kernels serve badly or refuse.

    Whole dimensions fill tiles of 64; of one rank's share, convolution channels and rows of in_proj are multiples of 8
    (stock code copies the convolution's input else, and products prefer them), and what FP8 kernels multiply of 16.
    """
    padded, ranks, warnings = export_shape(shape), tensor_parallel, []
    on_each = f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
    split = {"ffn": padded.ffn[0]} if padded.ffn else {}
    if padded.mamba_heads:
        d_inner, state = padded.mamba_heads[0] * padded.head_channels, padded.mamba_groups * padded.mamba_state
        split["mamba heads x channels"] = d_inner
        channels, rows = d_inner + 2 * state, 2 * (d_inner + state) + padded.mamba_heads[0]
        for what, size, so in (
            ("convolution channels", channels, ", which stock code's convolution needs"),
            ("in_proj rows", rows, ", so stock code copies its convolution's input"),
        ):
            if size % (8 * ranks):
                warnings.append(f"{what} = {size} is not a multiple of 8{on_each}{so}")
        if padded.mamba_groups % ranks:
            warnings.append(f"mamba groups = {padded.mamba_groups} do not split over {ranks} tensor-parallel ranks")
    for name, size in {"hidden": padded.hidden, **split}.items():
        if size % 64:
            warnings.append(f"{name} = {size} is not a multiple of 64")
        if ranks > 1 and name in split and size % (16 * ranks):
            warnings.append(f"{name} = {size} is not a multiple of 16{on_each}, which FP8 kernels need")
    return warnings


def hf_config(shape: ModelShape, settings: HfSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json in the classic style: one integer per width and `hybrid_override_pattern`.

    No mixture-of-experts, multi-token or `auto_map` keys: converters take their mere presence for another model.
    Raises ExportError if Mamba widths differ or a special token lies outside the vocabulary.
    """
    padded, token_ids, carried = export_shape(shape), settings.token_ids(), settings.carried
    if problems := token_problems(token_ids, shape.vocab):
        raise ExportError("; ".join(problems))
    sizes: dict[str, int] = {key: getattr(padded, field) for key, field in SIZES.items()}
    return {
        **MODEL,
        **FIXED,
        **{key: carried.get(key, default) for key, default in CARRIED.items()},
        **{key: carried[key] for key in CARRIED_IF_GIVEN if key in carried},
        **_without_cache(padded),
        **token_ids,
        **sizes,
        **{
            key: max(getattr(padded, field), default=carried.get(key, sizes.get(unused, 0)))
            for key, field, unused in WIDTHS.values()
        },
        "chunk_size": settings.chunk_size,
        "hybrid_override_pattern": str(padded.pattern),
        "layer_norm_epsilon": padded.norm_epsilon,
        "max_position_embeddings": settings.max_position_embeddings,
        "num_hidden_layers": len(padded.pattern),
        "rms_norm_eps": padded.norm_epsilon,
        "tie_word_embeddings": padded.tied_embeddings,
        **TIME_STEPS,
        **_for_converters(padded),
        "torch_dtype": DTYPE_NAMES[dtype],
    }


def _for_converters(shape: ModelShape) -> dict[str, int]:
    """Return what llama.cpp's converter asks for where heads x channels is no multiple of 64, its default channels."""
    d_inner = max(shape.mamba_heads, default=0) * shape.head_channels
    return {"mamba_d_head": shape.head_channels} if d_inner % 64 else {}


def _without_cache(shape: ModelShape) -> dict[str, bool]:
    """Return what a model says that stock code cannot hold a cache of: an attention layer is asked for its length."""
    return {} if shape.attention_heads else {"use_cache": False}


def stock_notes(shape: ModelShape) -> list[str]:
    """List what a user of the exported folder should know beforehand."""
    note = (
        "it keeps no attention layer, so stock transformers runs it without a cache (use_cache: false) and reads the "
        "whole text again for every generated token"
    )
    return [note] if _without_cache(shape) else []


def generation_config(settings: HfSettings, shape: ModelShape) -> dict[str, Any]:
    """Return generation_config.json: the source's as it is, or one that says no more than the special tokens.

    Either says use_cache: false for a model that stock code can run only so.
    """
    known = {key: value for key, value in settings.token_ids().items() if value is not None}
    written = {"_from_model_config": True, **known} if settings.generation is None else dict(settings.generation)
    return written | _without_cache(shape)


def token_problems(token_ids: Mapping[str, int | list[int] | None], vocab: int) -> list[str]:
    """List the special tokens that lie outside the vocabulary."""
    return [
        f"{key} = {value} is outside the vocabulary of {vocab}"
        for key, value in token_ids.items()
        if value is not None
        and any(not 0 <= token < vocab for token in (value if isinstance(value, list) else [value]))
    ]
