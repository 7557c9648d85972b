"""Write and read `config.json` of stock `nemotron_h`, by the export rules of FACTS 3."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from elastic.space.pattern import LayerKind, LayerPattern, PatternError
from elastic.space.shape import ModelShape, ShapeError

MODEL_TYPE = "nemotron_h"
ARCHITECTURE = "NemotronHForCausalLM"
_PATTERN_CHARACTER = {
    "mamba": "M",
    "linear_attention": "M",
    "mlp": "-",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
}
# Stock keys whose only value this project's layers compute; absent keys have this value by default.
_FIXED: dict[str, Any] = {
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
# Keys whose mere presence (unless null) means another model.
_FORBIDDEN = {
    "rope_scaling": "layers have no position embedding",
    "rope_parameters": "layers have no position embedding",
    "quantization_config": "weights must be plain; dequantise the folder first",
    "llm_config": "this is a multimodal model",
    "text_config": "this is a multimodal model",
    "block_configs": "layers of one kind must share their sizes",
}


class HfConfigError(ValueError):
    """A config.json this project cannot read as a hybrid of Mamba-2, attention and MLP layers."""


class ExportError(ValueError):
    """A model or folder that cannot be exported; the message says what to change."""


@dataclass(frozen=True)
class HfSettings:
    """What a config holds beside the sizes. `generation` extends generation_config.json, e.g. do_sample."""

    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    max_position_embeddings: int = 4096
    chunk_size: int = 128
    generation: Mapping[str, Any] = field(default_factory=dict)

    def token_ids(self) -> dict[str, int | list[int]]:
        """Return the special tokens that are set, in JSON form."""
        ids = {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in ids.items() if value is not None
        }


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
    return replace(shape, ffn=_widest(shape.ffn), attention_heads=_widest(shape.attention_heads))


def _widest(widths: tuple[int, ...]) -> tuple[int, ...]:
    return (max(widths, default=0),) * len(widths)


def export_warnings(shape: ModelShape, tensor_parallel: int = 1) -> list[str]:
    """List the sizes that stock code computes correctly but GPU kernels serve badly or refuse.

    Whole dimensions fill tiles of 64; of one rank's share, convolution channels and rows of in_proj are multiples of 8
    (or the latter are copied), and what FP8 kernels multiply of 16.
    """
    padded, ranks = export_shape(shape), tensor_parallel
    on_each = f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
    warnings = []
    split = {"ffn": padded.ffn[0]} if padded.ffn else {}
    if padded.mamba_heads:
        d_inner, state = padded.mamba_heads[0] * padded.head_channels, padded.mamba_groups * padded.mamba_state
        split["mamba heads x channels"] = d_inner
        channels, rows = d_inner + 2 * state, 2 * (d_inner + state) + padded.mamba_heads[0]
        if channels % (8 * ranks):
            rule = f"is not a multiple of 8{on_each}, which the causal convolution kernel needs"
            warnings.append(f"convolution channels = {channels} {rule}")
        if rows % (8 * ranks):
            warnings.append(
                f"in_proj rows = {rows} is not a multiple of 8{on_each}, so the convolution's input is copied"
            )
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
    padded, token_ids = export_shape(shape), settings.token_ids()
    for key, value in token_ids.items():
        if any(not 0 <= token < shape.vocab for token in (value if isinstance(value, list) else [value])):
            raise ExportError(f"{key} = {value} is outside the vocabulary of {shape.vocab}")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **_FIXED,
        **token_ids,
        "chunk_size": settings.chunk_size,
        "conv_kernel": padded.conv_kernel,
        # Nobody computes with it (inner size = mamba_num_heads * mamba_head_dim); older readers want it present.
        "expand": 2,
        "head_dim": padded.attention_channels,
        "hidden_size": padded.hidden,
        "hybrid_override_pattern": str(padded.pattern),
        "initializer_range": 0.02,
        "intermediate_size": max(padded.ffn, default=0),
        "layer_norm_epsilon": padded.norm_epsilon,
        "mamba_head_dim": padded.head_channels,
        "mamba_num_heads": max(padded.mamba_heads, default=padded.mamba_groups),
        "max_position_embeddings": settings.max_position_embeddings,
        "n_groups": padded.mamba_groups,
        "num_attention_heads": max(padded.attention_heads, default=padded.kv_heads),
        "num_hidden_layers": len(padded.pattern),
        "num_key_value_heads": padded.kv_heads,
        "num_logits_to_keep": 1,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rms_norm_eps": padded.norm_epsilon,
        "ssm_state_size": padded.mamba_state,
        "tie_word_embeddings": padded.tied_embeddings,
        "time_step_floor": 1e-4,
        "time_step_max": 0.1,
        # Stock code clamps dt from below at this value; training never did.
        "time_step_min": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": padded.vocab,
    }


def generation_config(settings: HfSettings) -> dict[str, Any]:
    """Return generation_config.json."""
    return {"_from_model_config": not settings.generation, **settings.token_ids(), **settings.generation}


def shape_from_hf_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes out of a stock config; raises HfConfigError listing every problem with field and value."""
    problems = _model_problems(config)
    sizes = {key: _size(config, key, problems) for key in _SIZES}
    epsilon = config.get("layer_norm_epsilon", config.get("rms_norm_eps"))
    if not isinstance(epsilon, float):
        problems.append(f"layer_norm_epsilon = {epsilon!r} must be a float")
    pattern = _pattern(config, problems)
    if problems:
        raise HfConfigError("config.json: " + "; ".join(problems))
    try:
        return ModelShape.uniform(
            pattern,
            ffn=sizes["intermediate_size"],
            mamba_heads=sizes["mamba_num_heads"],
            attention_heads=sizes["num_attention_heads"],
            vocab=sizes["vocab_size"],
            hidden=sizes["hidden_size"],
            head_channels=sizes["mamba_head_dim"],
            mamba_groups=sizes["n_groups"],
            mamba_state=sizes["ssm_state_size"],
            conv_kernel=sizes["conv_kernel"],
            kv_heads=sizes["num_key_value_heads"],
            attention_channels=sizes["head_dim"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_epsilon=epsilon,
        )
    except (PatternError, ShapeError) as error:
        raise HfConfigError(f"config.json: {error}") from error


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def settings_from_hf_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> HfSettings:
    """Read special tokens and limits, and what `generation` (generation_config.json) adds to them."""
    eos = config.get("eos_token_id", 2)
    settings = HfSettings(
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=config.get("pad_token_id", 0),
        max_position_embeddings=config.get("max_position_embeddings", 4096),
        chunk_size=config.get("chunk_size", 128),
    )
    known = settings.token_ids()
    added = {
        key: value
        for key, value in (generation or {}).items()
        if key not in ("_from_model_config", "transformers_version") and known.get(key) != value
    }
    return replace(settings, generation=added)


def import_warnings(config: Mapping[str, Any]) -> list[str]:
    """List settings under which stock transformers computes something else than training, vLLM and this project."""
    warnings = []
    if (floor := config.get("time_step_min", 0.001)) > 0:
        warnings.append(
            f"time_step_min = {floor}: stock transformers clamps dt there, training and vLLM do not; logits of the "
            f"stock folder may differ, exports carry 0.0"
        )
    if config.get("residual_in_fp32", False):
        warnings.append("residual_in_fp32 = true is not kept; exports carry false")
    return warnings


def _model_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("model_type") != MODEL_TYPE:
        problems.append(f"model_type = {config.get('model_type')!r} must be {MODEL_TYPE!r}")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            problems.append(f"{key} = {config[key]!r} is not supported, only {value!r}")
    problems += [f"{key} is set: {why}" for key, why in _FORBIDDEN.items() if config.get(key) is not None]
    if config.get("num_nextn_predict_layers", 0):
        problems.append(
            f"num_nextn_predict_layers = {config['num_nextn_predict_layers']}: multi-token-prediction layers are not "
            f"supported"
        )
    return problems


def _size(config: Mapping[str, Any], key: str, problems: list[str]) -> int:
    value = config.get(key)
    smallest = 0 if key == "intermediate_size" else 1
    if type(value) is not int or value < smallest:
        what = "missing" if key not in config else f"{value!r}"
        problems.append(f"{key} is {what}, it must be one integer of at least {smallest}")
        return smallest
    return value


def _pattern(config: Mapping[str, Any], problems: list[str]) -> str:
    """Return the pattern from the classic string or from the newer list of layer types."""
    text = config.get("hybrid_override_pattern")
    if text is None:
        types = config.get("layers_block_type", config.get("layer_types"))
        if not isinstance(types, list) or not types:
            problems.append("hybrid_override_pattern (or layers_block_type) is missing")
            return ""
        unknown = sorted({str(kind) for kind in types} - _PATTERN_CHARACTER.keys())
        if unknown:
            problems.append(f"layers_block_type holds unknown kinds {', '.join(unknown)}")
            return ""
        text = "".join(_PATTERN_CHARACTER[kind] for kind in types)
    try:
        length = len(LayerPattern.parse(text))
    except PatternError as error:
        problems.append(str(error))
        return ""
    if config.get("num_hidden_layers", length) != length:
        problems.append(f"num_hidden_layers = {config['num_hidden_layers']}, but the pattern has {length} layers")
    return text
