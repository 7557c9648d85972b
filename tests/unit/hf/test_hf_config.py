"""config.json follows the export rules, says what the shape says, and is read back with clear errors."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHConfig

from elastic.hf.card import CardInfo, model_card
from elastic.hf.config import (
    TRANSFORMERS,
    ExportError,
    export_shape,
    export_warnings,
    generation_config,
    hf_config,
)
from elastic.hf.config_read import checked_shape, import_warnings, settings_from_hf_config
from elastic.hf.export_settings import DtypeRule, ExportSettings, HfSettings, HfSettingsError
from elastic.hf.reload import stock_logits
from elastic.space.shape import ModelShape, Subnet
from tests.shapes import NANO_12B

SMALL = replace(NANO_12B.with_vocab(64), hidden=48, norm_epsilon=1e-6, tied_embeddings=True)
SHAPES = {
    "12B": NANO_12B,
    "small, tied": SMALL,
    "no attention": ModelShape.uniform(
        "M-M",
        **{field: getattr(NANO_12B, field) for field in ("vocab", "hidden", "head_channels", "mamba_groups")},
        ffn=64,
        mamba_heads=16,
        attention_heads=4,
        mamba_state=7,
        conv_kernel=3,
        kv_heads=4,
        attention_channels=9,
    ),
}
BF16 = ExportSettings(DtypeRule(torch.bfloat16))
SETTINGS = HfSettings(bos_token_id=1, eos_token_id=12, pad_token_id=0, max_position_embeddings=131072)


def config(shape: ModelShape = NANO_12B, **changes: Any) -> dict[str, Any]:
    return hf_config(shape, SETTINGS, torch.bfloat16) | changes


@pytest.mark.parametrize("name", SHAPES)
def test_the_config_says_the_shape(name: str) -> None:
    shape = SHAPES[name]
    written = json.loads(json.dumps(config(shape)))
    assert checked_shape(written) == (shape, [])
    assert settings_from_hf_config(written) == SETTINGS
    again = hf_config(shape, settings_from_hf_config(written), torch.bfloat16)
    assert again == written


def test_the_config_keeps_every_export_rule() -> None:
    written = config()
    # Above 0, for stock code takes its logarithm, and far below any step that bf16 or fp32 could tell from none.
    assert 0 < written["time_step_min"] <= 1e-20 and written["time_step_limit"] == [0.0, math.inf]
    assert written["hybrid_override_pattern"] == str(NANO_12B.pattern) and written["num_hidden_layers"] == 62
    lists = {key for key, value in written.items() if isinstance(value, list)}
    assert lists == {"architectures", "time_step_limit"}
    forbidden = ("expert", "moe", "nextn", "mtp", "auto_map", "layers_block_type", "n_group")
    assert not [key for key in written if any(word in key for word in forbidden) and key != "n_groups"]
    assert written["layer_norm_epsilon"] == written["rms_norm_eps"] == 1e-5
    assert (written["torch_dtype"], written["residual_in_fp32"]) == ("bfloat16", False)
    # llama.cpp's converter takes 64 channels for granted, and looks only whether they divide heads x channels.
    assert "mamba_d_head" not in written
    assert config(replace(NANO_12B, head_channels=79, mamba_heads=(8,) * 28))["mamba_d_head"] == 79


@pytest.mark.parametrize("name", SHAPES)
def test_stock_transformers_reads_the_same_sizes(name: str) -> None:
    shape = SHAPES[name]
    stock = NemotronHConfig(**config(shape))
    assert stock.hybrid_override_pattern == str(shape.pattern)
    assert stock.mamba_num_heads * stock.mamba_head_dim == shape.mamba_heads[0] * shape.head_channels
    assert (stock.time_step_min, stock.layer_norm_epsilon) == (1e-20, shape.norm_epsilon)
    assert list(stock.time_step_limit) == [0.0, math.inf]
    # What stock transformers writes itself, in its newer style, means the same.
    assert checked_shape(json.loads(json.dumps(stock.to_dict()))) == (shape, [])


def test_layers_of_one_kind_share_the_widest_width() -> None:
    shape = replace(SHAPES["no attention"], ffn=(40,))
    assert config(replace(NANO_12B, ffn=(64, *(128,) * 27)))["intermediate_size"] == 128
    assert config(replace(NANO_12B, attention_heads=(8, 16, 24, 8, 8, 8)))["num_attention_heads"] == 24
    assert export_shape(shape) == shape
    with pytest.raises(ExportError, match=r"layer 2: 64.*homogeneous mamba_head axis \(per_layer: false\)"):
        config(replace(NANO_12B, mamba_heads=(128, 64, *(128,) * 26)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type = 'llama' must be 'nemotron_h'"),
        ({"hybrid_override_pattern": "ME*-"}, "layers 1 .character 'E'. are Mixture-of-experts.*dense parent"),
        ({"hybrid_override_pattern": None, "layers_block_type": ["mamba", "moe"]}, "layers 1 .*Mixture-of-experts"),
        ({"hybrid_override_pattern": None, "layers_block_type": ["mamba", "conv"]}, "kinds conv, first at layer 1"),
        ({"hybrid_override_pattern": "M|M"}, "not one of M - "),
        ({"hybrid_override_pattern": "M", "layers_block_type": ["mlp"]}, "'M' and layers_block_type .-. disagree"),
        ({"hybrid_override_pattern": "M" * 1001}, "1,001 layers, more than any model's"),
        ({"hybrid_override_pattern": ["M"]}, "must be text of M, - and"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern .* is missing"),
        ({"num_nextn_predict_layers": 1}, "multi-token-prediction"),
        ({"num_hidden_layers": 61}, "num_hidden_layers = 61, but the pattern has 62"),
        ({"intermediate_size": [20480, 4096]}, r"intermediate_size is \[20480, 4096\], it must be one integer"),
        ({"hidden_size": 5120.0}, "hidden_size is 5120.0"),
        ({"head_dim": None}, "head_dim is None"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu' is not supported, only 'relu2'"),
        ({"use_bias": True}, "use_bias = True is not supported"),
        ({"use_conv_bias": False}, "use_conv_bias = False is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is set: layers have no position embedding"),
        ({"quantization_config": {}}, "quantization_config is set"),
        ({"mamba_num_heads": 127}, "mamba_heads = 127 is not a multiple of mamba_groups = 8"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon = 'small' must be a float"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06 must equal layer_norm_epsilon = 1e-05"),
        ({"norm_eps": 1e-6}, "norm_eps = 1e-06 must equal layer_norm_epsilon = 1e-05"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu' must equal mlp_hidden_act = 'relu2'"),
        ({"time_step_limit": ["a", "b"]}, "time_step_limit = .'a', 'b'. must be two numbers"),
        ({"time_step_limit": [0.1, 0.0]}, "must be two numbers, the smaller one first"),
        ({"hidden_size": 2**60}, "hidden_size is 1152921504606846976, larger than any model's"),
        ({"hidden_size": True}, "hidden_size is True, it must be one integer"),
        ({"hidden_size": -1}, "hidden_size is -1, it must be one integer of at least 1"),
        ({"vocab_size": "131072"}, "vocab_size is '131072', it must be one integer"),
        ({"mamba_d_conv": 3}, "mamba_d_conv = 3 and conv_kernel = 4 mean the same and disagree"),
        ({"mamba_d_head": 64}, "mamba_d_head = 64 and mamba_head_dim = 80 mean the same and disagree"),
        ({"architectures": ["NemotronHForSequenceClassification"]}, "must be .'NemotronHForCausalLM'."),
        ({"chunk_size": 0}, "chunk_size = 0 must be one integer of at least 1"),
        ({"eos_token_id": 200000}, "eos_token_id = 200000 is outside the vocabulary of 131072"),
        ({"pad_token_id": "<pad>"}, "pad_token_id = <pad> must be an integer or null"),
        ({"time_step_max": "0.1"}, "time_step_max = 0.1 must be float"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be true or false"),
    ],
)
def test_pitfall_05_other_models_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    shape, problems = checked_shape(config(**changes))
    assert shape is None and re.search(message, "; ".join(problems)), problems


def test_all_problems_are_listed_at_once() -> None:
    broken = config(use_bias=True, vocab_size=0)
    del broken["ssm_state_size"]
    shape, problems = checked_shape(broken)
    assert shape is None
    for part in ("use_bias", "vocab_size is 0", "ssm_state_size is missing"):
        assert any(part in problem for problem in problems)


def test_generation_settings_travel() -> None:
    published = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 11, 12], "pad_token_id": 0}
    published |= {"transformers_version": "4.51", "do_sample": True}
    settings = settings_from_hf_config(config(), published)
    assert generation_config(settings, NANO_12B) == published
    assert hf_config(NANO_12B, settings, torch.bfloat16)["eos_token_id"] == 12
    with pytest.raises(ExportError, match="eos_token_id = 12 is outside the vocabulary of 8"):
        hf_config(NANO_12B.with_vocab(8), SETTINGS, torch.bfloat16)
    own = generation_config(replace(SETTINGS, pad_token_id=None), NANO_12B)
    assert own == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 12}


def test_a_model_without_attention_says_that_stock_code_cannot_cache_it() -> None:
    shape = SHAPES["no attention"]
    assert config(shape)["use_cache"] is False and config()["use_cache"] is True
    for given in (None, {"do_sample": True, "use_cache": True}):
        settings = replace(SETTINGS, generation=given)
        assert generation_config(settings, shape)["use_cache"] is False
        assert generation_config(settings, NANO_12B).get("use_cache", True) is True
    # An export says it by itself, so that a later one with attention layers would not.
    assert settings_from_hf_config(config(shape)).carried == {}


def test_the_versions_that_are_right_are_asked_for_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers>={TRANSFORMERS}"' in project

    def card_of(shape: ModelShape) -> str:
        return model_card(CardInfo("test", shape, Subnet.full(shape)), shape, BF16, "checked", 0)

    card = card_of(SHAPES["no attention"])
    assert f"Needs transformers {TRANSFORMERS} or newer" in card and "(use_cache: false)" in card
    assert "use_cache" not in card_of(NANO_12B)
    monkeypatch.setattr("transformers.__version__", "5.14.0")
    with pytest.raises(ExportError, match=r"transformers 5\.14\.0 is installed\. Needs transformers 5\.15 or newer"):
        stock_logits(tmp_path, torch.zeros(1, 4, dtype=torch.int64))


def test_settings_survive_json() -> None:
    source = config(time_step_max=0.2, use_mamba_kernels=True, eos_token_id=[2, 12], bos_token_id=None)
    settings = settings_from_hf_config(source, {"do_sample": True})
    assert HfSettings.from_json(json.loads(json.dumps(asdict(settings)))) == settings
    assert hf_config(NANO_12B, settings, torch.bfloat16) == source
    with pytest.raises(HfSettingsError, match="other keys than expected"):
        HfSettings.from_json({"bos_token_id": 1})


def test_a_token_that_is_not_there_is_said_to_be_none() -> None:
    """Stock code puts its own defaults, 1, 2 and 0, where a config says nothing."""
    none = hf_config(NANO_12B, HfSettings(bos_token_id=None, pad_token_id=None), torch.float32)
    stock = NemotronHConfig(**none)
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (None, 2, None)
    del none["bos_token_id"]
    assert NemotronHConfig(**none).bos_token_id == 1


def test_warnings_name_what_kernels_or_stock_code_do_differently() -> None:
    assert export_warnings(NANO_12B) == []
    warnings = " ".join(export_warnings(replace(SMALL, head_channels=5, mamba_heads=(24,) * 28, mamba_state=3)))
    for part in ("hidden = 48 is not a multiple of 64", "mamba heads x channels = 120"):
        assert part in warnings
    odd = replace(NANO_12B, head_channels=79, mamba_heads=(8,) * 28, mamba_state=1, mamba_groups=1)
    assert any("convolution channels = 634" in warning for warning in export_warnings(odd))
    assert any("time_step_min = 0.001" in warning for warning in import_warnings(config(time_step_min=0.001)))
    assert import_warnings(config()) == []
    finite = import_warnings(config(time_step_limit=[0.0, 0.1], auto_map={}, mine=1, residual_in_fp32=True))
    for part in ("time_step_limit = [0.0, 0.1] is not kept", "auto_map is ignored", "not kept: mine", "residual_in_fp"):
        assert any(part in warning for warning in finite)
    for limit in ([0.0, math.inf], [0.0, {"__float__": "Infinity"}], None):
        assert import_warnings(config(time_step_limit=limit, n_routed_experts=8)) == []


def test_export_warnings_judge_one_ranks_share() -> None:
    """By hand, on 8 ranks: 1,280 inner channels, 1,536 convolution channels and 2,832 rows of in_proj on each."""
    assert [export_warnings(NANO_12B, ranks) for ranks in (1, 2, 4, 8)] == [[], [], [], []]
    heads = export_warnings(replace(NANO_12B, mamba_heads=(96,) * 28), 8)
    # 2 x (960 + 128) + 12 = 2,188 = 8 x 273.5; the convolution's own 960 + 256 = 1,216 = 8 x 152.
    assert heads == [
        "in_proj rows = 17504 is not a multiple of 8 on each of 8 tensor-parallel ranks, so stock code copies its "
        "convolution's input"
    ]
    (ffn,) = export_warnings(replace(NANO_12B, ffn=(15_680,) * 28), 8)
    assert ffn.startswith("ffn = 15680 is not a multiple of 16 on each of 8") and 15_680 // 8 % 16 == 8
    groups = export_warnings(replace(NANO_12B, mamba_groups=4), 8)
    assert groups == ["mamba groups = 4 do not split over 8 tensor-parallel ranks"]
    # 64 x 71 = 4,544 inner channels are 568 = 16 x 35.5 on each rank; 568 + 2 x 2 convolution channels = 8 x 71.5, and
    # 2 x (568 + 2) + 8 rows of in_proj = 8 x 143.5.
    narrow = export_warnings(replace(NANO_12B, mamba_heads=(64,) * 28, head_channels=71, mamba_state=2), 8)
    names = ["convolution channels", "in_proj rows", "mamba heads x channels"]
    assert [text.partition(" = ")[0] for text in narrow] == names
