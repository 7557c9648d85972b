"""Read which layers a stock `nemotron_h` config has: from the classic string or from the newer list of kinds."""

from collections.abc import Mapping
from typing import Any

from elastic.hf.safe_files import listed, quoted, shown
from elastic.space.shape import LayerPattern, PatternError

_MOST_LAYERS = 1000
_PATTERN_CHARACTER = {
    "mamba": "M",
    "linear_attention": "M",
    "mlp": "-",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
}


def read_pattern(config: Mapping[str, Any], problems: list[str]) -> str:
    """Return the layer pattern; where it is missing, contradicts itself or is not supported, add to `problems`."""
    found, text = len(problems), config.get("hybrid_override_pattern")
    key = "layers_block_type" if text is None else "hybrid_override_pattern"
    listed_kinds = _from_types(config.get("layers_block_type"), problems)
    if text is not None and (not isinstance(text, str) or not text):
        problems.append(f"hybrid_override_pattern = {quoted(text)} must be text of M, - and *")
    elif text is None and listed_kinds is None and len(problems) == found:
        problems.append("hybrid_override_pattern (or layers_block_type) is missing")
    elif text is not None and listed_kinds is not None and text != listed_kinds:
        problems.append(f"hybrid_override_pattern = {quoted(text)} and layers_block_type ({listed_kinds}) disagree")
    if len(problems) > found:
        return ""
    pattern = text if isinstance(text, str) else str(listed_kinds)
    _check_layers(pattern, key, problems)
    length = config.get("num_hidden_layers")
    if length is not None and (type(length) is not int or length != len(pattern)):
        problems.append(f"num_hidden_layers = {shown(length)}, but the pattern has {len(pattern)} layers")
    return pattern


def _from_types(types: Any, problems: list[str]) -> str | None:
    if types is None:
        return None
    if not isinstance(types, list) or not types or not all(isinstance(kind, str) for kind in types):
        problems.append(f"layers_block_type = {shown(types)} must be a list of layer kinds")
        return None
    if unknown := set(types) - _PATTERN_CHARACTER.keys():
        first = next(layer for layer, kind in enumerate(types) if kind in unknown)
        problems.append(f"layers_block_type holds unknown kinds {listed(unknown)}, first at layer {first}")
        return None
    return "".join(_PATTERN_CHARACTER[kind] for kind in types)


def _check_layers(pattern: str, key: str, problems: list[str]) -> None:
    experts = [layer for layer, character in enumerate(pattern) if character == "E"]
    if len(pattern) > _MOST_LAYERS:
        problems.append(f"{key} has {len(pattern):,} layers, more than any model's ({_MOST_LAYERS:,})")
    elif experts:
        where = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
        problems.append(
            f"{key}: layers {where} (character 'E') are Mixture-of-experts layers, which are not supported; use a "
            f"dense parent, whose layers are all M, - or *"
        )
    else:
        try:
            # A boundary between pipeline stages is Megatron-Core's notation, stock code does not know it.
            LayerPattern.parse(pattern.replace("|", "?"))
        except PatternError as error:
            problems.append(f"{key}: {error}")
