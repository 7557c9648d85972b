"""Read `config.json` of stock `nemotron_h`, as published or as transformers 5 writes it, with every problem named.

The values come from a file of somebody else: each is looked at before it is used, and none is trusted to be of the
type, or of a size, that a model could have.
"""

import math
from collections.abc import Mapping
from typing import Any

from elastic.hf.config import CARRIED, CARRIED_IF_GIVEN, FIXED, MODEL, SIZES, TIME_STEPS, WIDTHS, token_problems
from elastic.hf.export_settings import HfSettings
from elastic.hf.fp8 import quantisation_problem
from elastic.hf.safe_files import listed, quoted, shown
from elastic.space.axes import LayerKind
from elastic.space.shape import LayerPattern, ModelShape, PatternError, ShapeError

# Other names that stock code of some release reads, and the name used here.
_ALIASES = {
    "attention_head_dim": "head_dim",
    "dtype": "torch_dtype",
    "layer_types": "layers_block_type",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_d_conv": "conv_kernel",
    "mamba_d_head": "mamba_head_dim",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_min": "time_step_min",
    "mamba_expand": "expand",
    "mamba_n_groups": "n_groups",
}
_PATTERN_CHARACTER = dict(mamba="M", linear_attention="M", mlp="-", attention="*", full_attention="*", moe="E")
# Keys of other models that say the same; whoever reads them must not find another value.
_EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon", "rms_norm_epsilon", "layer_norm_eps")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation")
# Far beyond any model, and small enough that no product of sizes surprises anybody.
_LARGEST_SIZE, _MOST_LAYERS = 2**24, 1000
# Keys whose mere presence (unless null) means another model.
_FORBIDDEN = {
    **dict.fromkeys(("rope_scaling", "rope_parameters"), "layers have no position embedding"),
    **dict.fromkeys(("llm_config", "text_config"), "this is a multimodal model"),
    "block_configs": "layers of one kind must share their sizes",
}
_WIDTHS = tuple(key for key, _, _ in WIDTHS.values())
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that are read, or that stock code writes into every config and that mean nothing without experts or
# multi-token layers.
_KNOWN = {
    *SIZES, *_WIDTHS, *_FORBIDDEN, *_TOKENS, *FIXED, *CARRIED, *CARRIED_IF_GIVEN, *_EPSILONS, *_ACTIVATIONS,
    *MODEL, "_name_or_path", "auto_map", "chunk_size", "hybrid_override_pattern", "layer_norm_epsilon",
    "layers_block_type", "max_position_embeddings", "moe_intermediate_size", "moe_latent_size",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "mtp_hybrid_override_pattern",
    "mtp_layers_block_type", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
    "num_experts_per_tok", "num_hidden_layers", "num_nextn_predict_layers", "output_router_logits",
    "quantization_config", "routed_scaling_factor", "tie_word_embeddings", "time_step_limit", "time_step_min",
    "topk_group", "torch_dtype", "transformers_version",
}  # fmt: skip


def checked_shape(raw: Mapping[str, Any]) -> tuple[ModelShape | None, list[str]]:
    """Return the shape that a stock config describes, or None, and every problem there is."""
    config, problems = _canonical(raw)
    problems += _model_problems(config)
    sizes = {key: _size(config, key, problems) for key in (*SIZES, *_WIDTHS)}
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        problems.append(f"layer_norm_epsilon = {epsilon!r} must be a float between 0 and 1")
    problems += [
        f"{key} = {shown(config[key])} must equal layer_norm_epsilon = {shown(epsilon)}"
        for key in _EPSILONS
        if config.get(key) not in (None, epsilon)
    ]
    pattern = _pattern(config, problems)
    problems += _settings_problems(config, sizes["vocab_size"])
    if problems:
        return None, problems
    fields = SIZES | {key: field for key, field, _ in WIDTHS.values()}
    given = {fields[key]: size for key, size in sizes.items()}
    tied = config.get("tie_word_embeddings", False)
    try:
        return ModelShape.uniform(pattern, **given, tied_embeddings=tied, norm_epsilon=epsilon), []
    except (PatternError, ShapeError) as error:
        return None, [str(error)]


def settings_from_hf_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, license: Mapping[str, str] | None = None
) -> HfSettings:
    """Read special tokens, limits and what else travels, of a config without problems; the others as they are."""
    config, _ = _canonical(raw)
    kinds = set(_pattern(config, []))
    kept = {key: config[key] for key, default in CARRIED.items() if config.get(key, default) != default}
    kept |= {key: config[key] for key in CARRIED_IF_GIVEN if key in config}
    # What an export writes by itself: no cache without attention, the width of layers that are not there.
    if LayerKind.ATTENTION not in kinds:
        kept.pop("use_cache", None)
    for kind, (key, _, unused) in WIDTHS.items():
        if kind not in kinds and config[key] != config.get(unused, 0):
            kept[key] = config[key]
    read = (*_TOKENS, "max_position_embeddings", "chunk_size")
    given: dict[str, Any] = {key: config[key] for key in read if key in config}
    if isinstance(ends := given.get("eos_token_id"), list):
        given["eos_token_id"] = tuple(ends)
    return HfSettings(**given, carried=kept, generation=generation, license=license or {})


def special_token_problems(config: Mapping[str, Any], vocab: int, is_generation: bool) -> list[str]:
    """List what is wrong with the special tokens of a config, or of a generation_config.json (each may be several)."""
    tokens = {key: config[key] for key in _TOKENS if key in config}
    rule = "an integer, a list of them or null" if is_generation else "an integer or null"
    wrong = []
    for key, value in tokens.items():
        several = isinstance(value, list) and (is_generation or key == "eos_token_id")
        if value is not None and not all(type(token) is int for token in (value if several else [value])):
            wrong.append(f"{key} = {shown(value)} must be {rule}")
    return wrong or token_problems(tokens, vocab)


def import_warnings(config: Mapping[str, Any]) -> list[str]:
    """List what a config without problems says that is computed otherwise here, or not kept."""
    known, _ = _canonical(config)
    warnings = []
    if (floor := known.get("time_step_min", 0.001)) > TIME_STEPS["time_step_min"]:
        warnings.append(
            f"time_step_min = {floor}: stock transformers clamps dt there, training and vLLM do not; logits of the "
            f"stock folder may differ, exports carry {TIME_STEPS['time_step_min']}"
        )
    if known.get("residual_in_fp32", False):
        warnings.append(
            "residual_in_fp32 = true is carried, but this project and stock transformers keep the residual stream "
            "in the type they compute in"
        )
    limit = known.get("time_step_limit")
    if limit is not None and limit != [0.0, math.inf]:
        warnings.append(f"time_step_limit = {shown(limit)} is not kept: stock transformers and vLLM ignore it, too")
    if "auto_map" in config:
        warnings.append("auto_map is ignored: code of the folder is never run, and exports need none")
    if unknown := known.keys() - _KNOWN:
        warnings.append(f"config keys that stock nemotron_h does not know are not kept: {listed(unknown)}")
    return warnings


def _canonical(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the config under the names used here; problems where two names of one thing disagree."""
    config, problems = dict(raw), []
    for alias, key in _ALIASES.items():
        value = config.pop(alias, None)
        if value is not None and config.get(key) not in (None, value):
            problems.append(f"{alias} = {shown(value)} and {key} = {shown(config[key])} mean the same and disagree")
        elif value is not None:
            config[key] = value
    if isinstance(limit := config.get("time_step_limit"), list):
        wrapped = {"__float__": "Infinity"}  # as transformers 5 writes it
        config["time_step_limit"] = [math.inf if bound == wrapped else bound for bound in limit]
    return config, problems


def _model_problems(config: Mapping[str, Any]) -> list[str]:
    problems, predicted = [], config.get("num_nextn_predict_layers")
    model, architectures = config.get("model_type"), config.get("architectures")
    if model != MODEL["model_type"]:
        problems.append(f"model_type = {quoted(model)} must be {MODEL['model_type']!r}")
    if architectures not in (None, MODEL["architectures"]):
        problems.append(f"architectures = {shown(architectures)} must be {MODEL['architectures']}")
    problems += [
        f"{key} = {quoted(config[key])} is not supported, only {value!r}"
        for key, value in FIXED.items()
        if config.get(key, value) != value
    ]
    problems += [
        f"{key} = {quoted(config[key])} must equal mlp_hidden_act = 'relu2', the only one there is"
        for key in _ACTIVATIONS
        if config.get(key) not in (None, FIXED["mlp_hidden_act"])
    ]
    problems += [f"{key} is set: {why}" for key, why in _FORBIDDEN.items() if config.get(key) is not None]
    problems += filter(None, [quantisation_problem(config)])
    if predicted not in (None, 0):
        problems.append(
            f"num_nextn_predict_layers = {shown(predicted)}: multi-token-prediction layers are not supported; save the "
            f"model without them (0) and without their mtp tensors"
        )
    return problems


def _pattern(config: Mapping[str, Any], problems: list[str]) -> str:
    """Return the layers, by the classic text or the newer list of kinds, or "" with what is wrong in `problems`."""
    text, types = config.get("hybrid_override_pattern"), config.get("layers_block_type")
    found, key = len(problems), "layers_block_type" if text is None else "hybrid_override_pattern"
    spelled = None  # what the list says
    if types is not None and not (isinstance(types, list) and types and all(isinstance(kind, str) for kind in types)):
        problems.append(f"layers_block_type = {shown(types)} must be a list of layer kinds")
    elif types is not None and (unknown := set(types) - _PATTERN_CHARACTER.keys()):
        first = next(layer for layer, kind in enumerate(types) if kind in unknown)
        problems.append(f"layers_block_type holds unknown kinds {listed(unknown)}, first at layer {first}")
    elif types is not None:
        spelled = "".join(_PATTERN_CHARACTER[kind] for kind in types)
    if text is not None and (not isinstance(text, str) or not text):
        problems.append(f"hybrid_override_pattern = {quoted(text)} must be text of M, - and *")
    elif text is None and types is None:
        problems.append("hybrid_override_pattern (or layers_block_type) is missing")
    elif text is not None and spelled not in (None, text):
        problems.append(f"hybrid_override_pattern = {quoted(text)} and layers_block_type ({spelled}) disagree")
    if len(problems) > found:
        return ""
    pattern = str(spelled if text is None else text)
    experts = [str(layer) for layer, character in enumerate(pattern) if character == "E"]
    if len(pattern) > _MOST_LAYERS:
        problems.append(f"{key} has {len(pattern):,} layers, more than any model's ({_MOST_LAYERS:,})")
    elif experts:
        problems.append(
            f"{key}: layers {', '.join(experts[:8] + ['...'] * (len(experts) > 8))} (character 'E') are "
            f"Mixture-of-experts layers, which are not supported; use a dense parent, whose layers are all M, - or *"
        )
    else:
        try:
            # A boundary between pipeline stages is Megatron-Core's notation, stock code does not know it.
            LayerPattern.parse(pattern.replace("|", "?"))
        except PatternError as error:
            problems.append(f"{key}: {error}")
    length = config.get("num_hidden_layers")
    if length is not None and (type(length) is not int or length != len(pattern)):
        problems.append(f"num_hidden_layers = {shown(length)}, but the pattern has {len(pattern)} layers")
    return pattern


def _settings_problems(config: Mapping[str, Any], vocab: int) -> list[str]:
    """List the wrong values of keys that size nothing but are read or carried."""
    problems = []
    for key in ("max_position_embeddings", "chunk_size"):
        value = config.get(key, 1)
        if type(value) is not int or not 1 <= value < 2**40:
            problems.append(f"{key} = {shown(value)} must be one integer of at least 1")
    if type(config.get("tie_word_embeddings", False)) is not bool:
        problems.append(f"tie_word_embeddings = {shown(config['tie_word_embeddings'])} must be true or false")
    types = {key: type(default) for key, default in CARRIED.items()} | CARRIED_IF_GIVEN
    problems += [
        f"{key} = {shown(config[key])} must be {kind.__name__}"
        for key, kind in types.items()
        if key in config and type(config[key]) is not kind
    ]
    floor, limit = config.get("time_step_min", 0.0), config.get("time_step_limit")
    if type(floor) not in (int, float) or floor < 0:
        problems.append(f"time_step_min = {shown(floor)} must be a number of at least 0")
    if limit is not None and not _is_range(limit):
        problems.append(f"time_step_limit = {shown(limit)} must be two numbers, the smaller one first")
    return problems + special_token_problems(config, vocab, is_generation=False)


def _size(config: Mapping[str, Any], key: str, problems: list[str]) -> int:
    value = config.get(key)
    smallest = 0 if key == "intermediate_size" else 1
    if type(value) is int and smallest <= value <= _LARGEST_SIZE:
        return value
    if type(value) is int and value > _LARGEST_SIZE:
        problems.append(f"{key} is {shown(value)}, larger than any model's ({_LARGEST_SIZE:,})")
    else:
        what = "missing" if key not in config else quoted(value)
        problems.append(f"{key} is {what}, it must be one integer of at least {smallest}")
    return _LARGEST_SIZE


def _is_range(limit: Any) -> bool:
    is_pair = isinstance(limit, list) and len(limit) == 2 and all(type(bound) in (int, float) for bound in limit)
    return is_pair and 0 <= limit[0] <= limit[1]
