"""Write a model as a Hugging Face folder, reload it, compare, and only then call it done."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.compress.hf_config import (
    ExportError,
    HfConfigError,
    HfSettings,
    generation_config,
    hf_config,
    settings_from_hf_config,
    shape_from_hf_config,
)
from elastic.compress.hf_names import FP32_SUFFIXES, HfTensorError, check_names, hf_sizes, stored_names, to_hf
from elastic.compress.logits import LogitDifference, probe_tokens
from elastic.compress.model_card import CardInfo, deployed_params, model_card
from elastic.compress.reload import ReloadError, reload_logits
from elastic.compress.slicing import TensorSource
from elastic.compress.tensor_files import TensorFileError, TensorFolder, TensorSpec, write_tensors
from elastic.space.cost import shape_cost
from elastic.space.shape import ModelShape

# Never code: a folder's own .py files stay behind.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Verification(StrEnum):
    """How an export was checked."""

    LOGITS = "logits of the reloaded folder against the reference"
    TENSORS = "every stored value against its source"


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written.

    A_log and D are kept in `state_dtype`: training holds them in fp32 and inference engines compute with fp32, so
    rounding them would only lose accuracy. `shard_bytes` bounds one weights file.
    """

    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    settings: HfSettings = field(default_factory=HfSettings)
    tokenizer_folder: Path | None = None
    shard_bytes: int = 5_000_000_000
    overwrite: bool = False


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the reference; differences are None if logits were not compared.

    `params` is the subnet's count, `deployed_params` what the folder holds with padding.
    """

    folder: Path
    params: int
    deployed_params: int
    verification: Verification
    max_abs_logit_diff: float | None
    relative: float | None


def export_folder(
    source: TensorSource,
    shape: ModelShape,
    folder: Path,
    card: CardInfo,
    options: ExportOptions,
    reference_logits: Callable[[Tensor], Tensor] | None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write `shape`'s tensors, given under Megatron-Core names, as a stock `nemotron_h` folder.

    Written aside and renamed once the check has passed; a failed export leaves nothing behind. `reference_logits`
    maps tokens [B, S] to logits [B, S, V] of the model that was exported; the reloaded folder must agree within
    `tolerance` relative to the largest logit. Without it (a model too large to run) every stored value is read back
    and compared with its source instead. Raises ExportError.
    """
    folder = Path(folder)
    specs = _specs(shape, options)
    _check_target(folder, sum(spec.num_bytes for spec in specs.values()), options.overwrite)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_tensors(aside, specs, to_hf(source, shape), options.shard_bytes)
        _write_json(aside / "config.json", hf_config(shape, options.settings, options.dtype))
        _write_json(aside / "generation_config.json", generation_config(options.settings))
        copy_tokenizer(options.tokenizer_folder, aside, shape.vocab)
        report = _verify(aside, folder, source, shape, specs, reference_logits, tolerance)
        text = model_card(card, shape, str(options.dtype).removeprefix("torch."), verification_text(report))
        (aside / "README.md").write_text(text)
        _move_into_place(aside, folder)
    except (TensorFileError, HfTensorError, ReloadError) as error:
        raise ExportError(f"export to {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def load_hf_config(folder: Path) -> tuple[ModelShape, HfSettings, dict[str, Any]]:
    """Read sizes, settings and the raw config of a stock folder; raises HfConfigError."""
    config = _read_json(Path(folder) / "config.json")
    generation = Path(folder) / "generation_config.json"
    settings = settings_from_hf_config(config, _read_json(generation) if generation.is_file() else None)
    return shape_from_hf_config(config), settings, config


def load_hf_tensors(folder: Path) -> tuple[ModelShape, TensorFolder]:
    """Open a stock folder for `from_hf`: its shape and a mapping that reads one tensor at a time.

    Names and sizes are compared with the config before any value is read. Raises HfConfigError, TensorFileError or
    HfTensorError. Nothing but JSON and safetensors is read; code in the folder is never run.
    """
    shape, _, _ = load_hf_config(folder)
    tensors = TensorFolder(Path(folder))
    sizes, stored = hf_sizes(shape), stored_names(tensors)
    check_names(stored, shape)
    wrong = [
        f"{name} is {tensors.size(stored[name])}, the config says {sizes[name]}"
        for name in stored
        if tensors.size(stored[name]) != sizes[name]
    ]
    if wrong:
        raise HfTensorError("Hugging Face tensors do not match the config: " + "; ".join(wrong[:4]))
    return shape, tensors


def copy_tokenizer(source: Path | None, folder: Path, vocab: int) -> None:
    """Copy tokenizer files, never code; raises ExportError if there are none or the tokenizer exceeds `vocab`."""
    if source is None:
        return
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ExportError(f"tokenizer folder {source} holds none of {', '.join(TOKENIZER_FILES[:3])}, ...")
    if (source / "tokenizer.json").is_file():
        tokenizer = _read_json(source / "tokenizer.json")
        added = [token["id"] for token in tokenizer.get("added_tokens", [])]
        entries = tokenizer.get("model", {}).get("vocab", {})
        largest = max([*added, *(entries.values() if isinstance(entries, dict) else [len(entries) - 1])], default=0)
        if largest >= vocab:
            raise ExportError(f"tokenizer {source} has token {largest}, the model's vocabulary is {vocab}")
    for path in found:
        shutil.copyfile(path, folder / path.name)


def verification_text(report: ExportReport) -> str:
    """Say in words what was checked and what came out."""
    if report.verification is Verification.TENSORS:
        return "Every stored value was read back and is equal to its source; logits were not compared."
    return (
        f"The folder was reloaded with stock transformers on the CPU in fp32 and its logits compared with the elastic "
        f"model's: largest difference {report.max_abs_logit_diff:.2e}, relative {report.relative:.2e}."
    )


def _specs(shape: ModelShape, options: ExportOptions) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(size, options.state_dtype if name.endswith(FP32_SUFFIXES) else options.dtype)
        for name, size in hf_sizes(shape).items()
    }


def _verify(
    aside: Path,
    folder: Path,
    source: TensorSource,
    shape: ModelShape,
    specs: dict[str, TensorSpec],
    reference_logits: Callable[[Tensor], Tensor] | None,
    tolerance: float,
) -> ExportReport:
    params, deployed = int(shape_cost(shape).params), deployed_params(shape)
    if reference_logits is None:
        _, stored = load_hf_tensors(aside)
        for name, tensor in to_hf(source, shape):
            if not torch.equal(stored[name], tensor.to("cpu", specs[name].dtype)):
                raise ExportError(f"export to {folder}: {name} was not stored as given")
        return ExportReport(folder, params, deployed, Verification.TENSORS, None, None)
    tokens = probe_tokens(shape.vocab)
    reloaded = reload_logits(aside, tokens)
    if reloaded.params != deployed:
        raise ExportError(f"export to {folder}: reloaded model has {reloaded.params} parameters, expected {deployed}")
    difference = LogitDifference.between(reloaded.logits, reference_logits(tokens))
    if not difference.within(tolerance):
        raise ExportError(
            f"export to {folder}: logits of the reloaded folder differ by {difference.max_abs:.3e} (relative "
            f"{difference.relative:.3e}, tolerance {tolerance:.1e}); nothing was written"
        )
    return ExportReport(folder, params, deployed, Verification.LOGITS, difference.max_abs, difference.relative)


def _check_target(folder: Path, num_bytes: int, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ExportError(f"folder {folder} is not empty; choose another one or set overwrite")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise ExportError(f"not enough disk for {folder}: {num_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def _move_into_place(aside: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old)
    else:
        os.replace(aside, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HfConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise HfConfigError(f"{path} must hold a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
