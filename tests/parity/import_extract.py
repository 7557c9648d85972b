"""Stock folders of random models with a tokenizer, and the verbs import_hf and extract run on them."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from elastic.config.load import load
from elastic.config.verbs import ExtractConfig, ImportConfig
from elastic.hf.export_settings import DtypeRule
from elastic.space.shape import ModelShape
from elastic.verbs.extract import run_extract
from elastic.verbs.import_hf import run_import
from tests.parity.hf_models import SHAPES, stock_model, tiny

QUIET, BF16 = Console(quiet=True), DtypeRule.trained(torch.bfloat16)
TOKENS = torch.randint(40, (2, 33), generator=torch.Generator().manual_seed(0))
FORMATS = ("fp32", "bf16", "bf16 with fp32 A_log and D")
# Each shape with one of the three number formats; the last one is a wide head as in the published parent.
CASES = {name: FORMATS[number % 3] for number, name in enumerate(SHAPES)} | {"head channels 80": FORMATS[2]}
WIDE = tiny("M*-", mamba_groups=8, mamba_heads=8, head_channels=80, hidden=64, ffn=64)
SPLITTABLE = [name for name, shape in SHAPES.items() if shape.mamba_groups % 2 == 0 and shape.kv_heads % 2 == 0]


def shape_of_case(name: str) -> ModelShape:
    return SHAPES.get(name, WIDE)


def stored(model: PreTrainedModel, number_format: str) -> PreTrainedModel:
    if number_format == "fp32":
        return model
    wide = ("A_log", ".D") if number_format.endswith("D") else ()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(wide or ("nothing",)):
                parameter.data = parameter.data.bfloat16()
    return model


def stock_folder(folder: Path, shape: ModelShape, number_format: str) -> PreTrainedModel:
    """Save a random model as stock transformers does, with a tokenizer and settings for generation."""
    model = stored(stock_model(shape), number_format)
    model.config.dtype = torch.float32 if number_format == "fp32" else torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0, do_sample=True, top_p=0.9
    )
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 39}, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= {name.replace("model.", "backbone.", 1): tensor for name, tensor in load_file(path).items()}
    return found


def place(folder: Path, name: str) -> dict[str, Any]:
    return {"exp_dir": str(folder), "name": name, "version": "v"}


def imported(folder: Path, source: Path, name: str = "imported") -> Path:
    return run_import(load(ImportConfig, {"source": str(source), "exp_manager": place(folder, name)}), QUIET)


def extracted(folder: Path, checkpoint: Path, name: str = "back", console: Console = QUIET, **values: Any) -> Path:
    config = {"init_from": {"checkpoint": str(checkpoint)}, "exp_manager": place(folder, name), **values}
    return run_extract(load(ExtractConfig, config), console)


def narrowed(shape: ModelShape) -> dict[str, Any]:
    """Describe a subnet by hand that is narrower on every axis that the shape can narrow, without its last layer."""
    given: dict[str, Any] = {"name": "narrow", "hidden": shape.hidden * 3 // 4}
    given["kept_layers"] = list(range(len(shape.pattern) - 1))
    if shape.ffn:
        given["ffn"] = [shape.ffn[0] // 2]
    if shape.mamba_heads and shape.mamba_heads[0] > shape.mamba_groups:
        given["mamba_heads"] = [shape.mamba_heads[0] - shape.mamba_groups]
    given["head_channels"] = shape.head_channels - 1
    if shape.attention_heads and shape.attention_heads[0] > shape.kv_heads:
        given["attention_heads"] = [shape.attention_heads[0] - shape.kv_heads]
    return given
