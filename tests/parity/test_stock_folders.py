"""Folders that stock transformers saves open here; folders written here load there without a word; both ways equal."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, NemotronHConfig, PreTrainedModel
from transformers.utils import logging as stock_logging

from elastic.hf.config import hf_config
from elastic.hf.export import export_folder
from elastic.hf.export_settings import (
    DtypeRule,
    ExportSettings,
    HfSettings,
    read_export_settings,
    write_export_settings,
)
from elastic.hf.folder import HfFolderError, open_hf_folder
from elastic.hf.names import from_hf
from elastic.hf.nested_values import value_check
from elastic.space.shape import ModelShape, Subnet
from tests.parity.hf_models import SHAPES, card_of, identical, stock_model, tiny
from tests.unit.hf.hf_folders import PUBLISHED

SHAPE, WHOLE = tiny("M-*"), 5_000_000_000
TOKENIZER = {
    "version": "1.0",
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "added_tokens": [],
}
# What the export rules of a stock folder fix, whatever the source says (docs/method.md 3).
FIXED_BY_RULES = {
    "time_step_min",
    "time_step_limit",
    "auto_map",
    "rms_norm_eps",
    "_name_or_path",
    "transformers_version",
    "n_routed_experts",
}


def stock_folder(folder: Path, shape: ModelShape, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """Save a stock model as stock transformers does, in its own style of config."""
    model = stock_model(shape).to(dtype)
    for key, value in config.items():
        setattr(model.config, key, value)
    model.generation_config.update(do_sample=True, temperature=0.6, eos_token_id=[2, 3])
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return model


def there_and_back(source: Path, scratch: Path, shard_bytes: int = WHOLE) -> Path:
    """Import a folder, carry what belongs to it through a checkpoint's folder, export the uncut parent."""
    opened = open_hf_folder(source)
    write_export_settings(opened.exports, scratch)
    carried = read_export_settings(scratch)
    assert carried is not None
    # Checkpoints hold fp32.
    held = {name: tensor.float() for name, tensor in from_hf(opened.tensors, opened.shape)}
    return export_whole(held, opened.shape, scratch / "model", carried, shard_bytes)


def export_whole(
    tensors: dict[str, Tensor], shape: ModelShape, folder: Path, exports: ExportSettings, shard_bytes: int = WHOLE
) -> Path:
    """Export a model that nobody cut, every stored value checked; returns the folder."""
    check = value_check(tensors, shape, Subnet.full(shape), lanes=1)
    return export_folder(tensors, shape, folder, card_of(shape), exports, check, shard_bytes).folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def differences(left: Path, right: Path) -> set[str]:
    """List the keys in which stock transformers sees two folders differ."""
    ours, theirs = (AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict() for folder in (left, right))
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_what_stock_transformers_saves_comes_back_as_it_was(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same function, bits, config, generation settings and tokenizer, for the parent that nobody cut."""
    stock_folder(tmp_path / "stock", SHAPES[name], dtype)
    opened = open_hf_folder(tmp_path / "stock")
    config = read(tmp_path / "stock" / "config.json")
    assert "num_experts_per_tok" in config and "hybrid_override_pattern" not in config
    assert (opened.shape, opened.exports.dtypes) == (SHAPES[name], DtypeRule(dtype))
    back = there_and_back(tmp_path / "stock", tmp_path / "scratch")
    assert identical(tensors_of(back), tensors_of(tmp_path / "stock"))
    no_cache = set() if SHAPES[name].attention_heads else {"use_cache"}
    assert differences(back, tmp_path / "stock") <= FIXED_BY_RULES | no_cache
    assert read(back / "generation_config.json") == read(tmp_path / "stock" / "generation_config.json") | (
        dict.fromkeys(no_cache, False)
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert read(back / file) == read(tmp_path / "stock" / file)


UNUSUAL = {
    "bos_token_id": None,
    "chunk_size": 64,
    "eos_token_id": [2, 5],
    "expand": 3,
    "initializer_range": 0.01,
    "mamba_ssm_cache_dtype": "bfloat16",
    "max_position_embeddings": 777,
    "num_logits_to_keep": 2,
    "pad_token_id": 3,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "time_step_floor": 1e-3,
    "time_step_max": 0.5,
    "use_cache": False,
    "use_mamba_kernels": False,
}


def test_every_setting_that_does_not_touch_the_function_comes_back(tmp_path: Path) -> None:
    stock_folder(tmp_path / "stock", SHAPE, **UNUSUAL, n_routed_experts=99, time_step_min=0.001)
    back = there_and_back(tmp_path / "stock", tmp_path / "scratch")
    assert differences(back, tmp_path / "stock") == {"time_step_min", "n_routed_experts", "_name_or_path"}
    written = read(back / "config.json")
    assert {key: written[key] for key in UNUSUAL} == UNUSUAL
    # Everything that stock code reads and does not compute this model's function with is either kept or listed above.
    defaults = NemotronHConfig(layers_block_type=["mlp"]).to_dict()
    assert {key for key in UNUSUAL if defaults[key] == UNUSUAL[key]} == set()


@pytest.mark.parametrize("rule", [DtypeRule(torch.bfloat16), DtypeRule.trained(torch.bfloat16)], ids=["all", "mixed"])
def test_a_classic_folder_comes_back_to_the_byte(rule: DtypeRule, tmp_path: Path) -> None:
    tensors = dict(from_hf(stock_model(SHAPE).state_dict(), SHAPE))
    settings = HfSettings(bos_token_id=None, eos_token_id=(2, 3), max_position_embeddings=99)
    source = export_whole(tensors, SHAPE, tmp_path / "source", ExportSettings(rule, settings), shard_bytes=8_000)
    back = there_and_back(source, tmp_path / "scratch", shard_bytes=8_000)
    files = {path.name for path in source.iterdir()}
    assert files == {path.name for path in back.iterdir()} and len(files) > 5
    for name in files:
        assert (source / name).read_bytes() == (back / name).read_bytes(), name


def test_a_published_config_comes_back_but_for_the_rules(tmp_path: Path) -> None:
    stock_folder(tmp_path / "stock", SHAPE, torch.bfloat16)
    published = hf_config(SHAPE, HfSettings(eos_token_id=12), torch.bfloat16) | PUBLISHED
    (tmp_path / "stock" / "config.json").write_text(json.dumps(published))
    back = there_and_back(tmp_path / "stock", tmp_path / "scratch")
    lost = {"auto_map", "transformers_version"}
    expected = {key: value for key, value in published.items() if key not in lost} | {"time_step_min": 1e-20}
    assert read(back / "config.json") == expected
    assert differences(back, tmp_path / "stock") <= FIXED_BY_RULES


def test_widths_of_layers_that_are_not_there_come_back(tmp_path: Path) -> None:
    config = hf_config(tiny("M"), HfSettings(), torch.float32)
    config |= {"intermediate_size": 11, "num_attention_heads": 6}
    stock_folder(tmp_path / "stock", tiny("M"))
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    assert read(there_and_back(tmp_path / "stock", tmp_path / "scratch") / "config.json") == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers_block_type": ["mamba", "moe"]}, r"layers_block_type: layers 1 .*use a dense parent"),
        (
            {"layers_block_type": ["mamba", "mlp"], "num_nextn_predict_layers": 1},
            "multi-token-prediction layers are not",
        ),
    ],
)
def test_models_with_experts_or_multi_token_layers_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    config = hf_config(tiny("M-"), HfSettings(), torch.float32) | {"time_step_min": 0.001}
    config |= {"n_routed_experts": 2, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8, **changes}
    del config["hybrid_override_pattern"]
    AutoModelForCausalLM.from_config(NemotronHConfig(**config)).save_pretrained(tmp_path)
    with pytest.raises(HfFolderError, match=message):
        open_hf_folder(tmp_path)


def test_half_precision_saved_by_stock_code_is_refused_with_the_remedy(tmp_path: Path) -> None:
    stock_folder(tmp_path, SHAPE, torch.float16)
    with pytest.raises(HfFolderError, match=r"are F16 .*load the model with dtype=torch\.float32 and save it again"):
        open_hf_folder(tmp_path)


class Heard(logging.Handler):
    """Keeps what stock transformers says at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Which kernels are installed says something of this machine, nothing of the folder.
        if not record.name.endswith("hub_kernels"):
            self.messages.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    heard, logger, before = Heard(), stock_logging.get_logger("transformers"), stock_logging.get_verbosity()
    stock_logging.set_verbosity_warning()
    stock_logging.warning_once.cache_clear()  # what another test has heard already is said again
    logger.addHandler(heard)
    try:
        yield heard.messages
    finally:
        logger.removeHandler(heard)
        stock_logging.set_verbosity(before)


FP32, BF16 = DtypeRule(torch.float32), DtypeRule.trained(torch.bfloat16)
EXPORTS: dict[str, tuple[ModelShape, ExportSettings]] = {
    "fp32": (SHAPE, ExportSettings(FP32)),
    "bf16": (SHAPE, ExportSettings(BF16)),
    "all bf16": (SHAPE, ExportSettings(DtypeRule(torch.bfloat16))),
    "shards": (tiny("M-M*-"), ExportSettings(BF16)),
    "tied head": (SHAPES["groups 2, tied head"], ExportSettings(FP32)),
    "no special tokens": (SHAPE, ExportSettings(BF16, HfSettings(None, None, None))),
}


def loaded(folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """Load and generate as a user would; return the model and everything there was to complain about."""
    with listening() as messages:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, dtype="auto", output_loading_info=True
        )
        answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 3
    return model, [*messages, *(f"{what}: {found}" for what, found in info.items() if found)]


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_loads_and_generates_without_a_word(name: str, tmp_path: Path) -> None:
    shape, exports = EXPORTS[name]
    tensors = dict(from_hf(stock_model(shape).state_dict(), shape))
    shard_bytes = 8_000 if name == "shards" else WHOLE
    folder = export_whole(tensors, shape, tmp_path / "model", exports, shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) == 1 or name == "shards"
    model, complaints = loaded(folder)
    assert complaints == []
    assert model.dtype == exports.dtypes.main


def test_an_export_that_says_something_wrong_is_heard(tmp_path: Path) -> None:
    """The test above would notice: one key that stock code remarks on, and one tensor that is not there."""
    tensors = dict(from_hf(stock_model(SHAPE).state_dict(), SHAPE))
    exports = ExportSettings(FP32, HfSettings(carried={"use_mamba_kernels": False}))
    folder = export_whole(tensors, SHAPE, tmp_path / "model", exports)
    _, complaints = loaded(folder)
    assert any("use_mamba_kernels" in complaint for complaint in complaints)
    config = read(folder / "config.json") | {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4}
    config["time_step_min"] = 0.001
    (folder / "config.json").write_text(json.dumps(config))
    _, complaints = loaded(folder)
    assert any("missing_keys" in complaint and "layers.3" in complaint for complaint in complaints)


def test_a_carried_tokenizer_loads_as_the_source_does(tmp_path: Path) -> None:
    stock_folder(tmp_path / "stock", SHAPE)
    back = there_and_back(tmp_path / "stock", tmp_path / "scratch")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (back, tmp_path / "stock"))
    assert ours("abba")["input_ids"] == theirs("abba")["input_ids"] == [2, 1, 0]
