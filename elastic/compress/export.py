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

from elastic.compress.disk import DiskSpaceError, check_free_space
from elastic.compress.hf_config import ExportError, HfSettings, generation_config, hf_config
from elastic.compress.hf_dtypes import DtypeRule
from elastic.compress.hf_folder import CONFIG_FILE, GENERATION_FILE, HfFolderError, open_hf_folder
from elastic.compress.hf_names import HfTensorError, hf_sizes, to_hf
from elastic.compress.logits import LogitDifference, probe_tokens
from elastic.compress.model_card import CardInfo, deployed_params, model_card
from elastic.compress.reload import ReloadError, reload_logits
from elastic.compress.slicing import TensorSource
from elastic.compress.tensor_files import TensorFolder, TensorSpec, write_tensors
from elastic.compress.tensor_headers import TensorFileError
from elastic.compress.tokenizer_files import TokenizerFileError, copy_tokenizer
from elastic.space.cost import shape_cost
from elastic.space.shape import ModelShape


class Verification(StrEnum):
    """How an export was checked."""

    LOGITS = "logits of the reloaded folder against the reference"
    TENSORS = "every stored value against its source"


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written.

    `dtype` is fp32 or bf16 for everything but A_log and D, which stay in fp32, or a rule: that of a source's folder
    gives every tensor back as it came. `shard_bytes` bounds one weights file.
    """

    dtype: torch.dtype | DtypeRule = torch.bfloat16
    settings: HfSettings = field(default_factory=HfSettings)
    tokenizer_folder: Path | None = None
    shard_bytes: int = 5_000_000_000
    overwrite: bool = False

    @property
    def rule(self) -> DtypeRule:
        """Return the format of every tensor; raises DtypeError for other formats than fp32 and bf16."""
        return self.dtype if isinstance(self.dtype, DtypeRule) else DtypeRule.trained(self.dtype)


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
    folder, rule = Path(folder), options.rule
    specs = {name: TensorSpec(size, rule.of(name)) for name, size in hf_sizes(shape).items()}
    _check_target(folder, sum(spec.num_bytes for spec in specs.values()), options.overwrite)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_tensors(aside, specs, to_hf(source, shape), options.shard_bytes)
        _write_json(aside / CONFIG_FILE, hf_config(shape, options.settings, rule.main))
        _write_json(aside / GENERATION_FILE, generation_config(options.settings))
        copy_tokenizer(options.tokenizer_folder, aside, shape.vocab)
        report = _verify(aside, folder, source, shape, specs, reference_logits, tolerance)
        text = model_card(card, shape, str(rule.main).removeprefix("torch."), verification_text(report))
        (aside / "README.md").write_text(text)
        _move_into_place(aside, folder)
    except (TensorFileError, TokenizerFileError, HfFolderError, HfTensorError, ReloadError) as error:
        raise ExportError(f"export to {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def load_hf_tensors(folder: Path) -> tuple[ModelShape, TensorFolder]:
    """Open a stock folder for `from_hf`: its shape and a mapping that reads one tensor at a time.

    Short for `open_hf_folder`, for callers that need no more of it; raises HfFolderError.
    """
    source = open_hf_folder(folder)
    return source.shape, source.tensors


def verification_text(report: ExportReport) -> str:
    """Say in words what was checked and what came out."""
    if report.verification is Verification.TENSORS:
        return "Every stored value was read back and is equal to its source; logits were not compared."
    return (
        f"The folder was reloaded with stock transformers on the CPU in fp32 and its logits compared with the elastic "
        f"model's: largest difference {report.max_abs_logit_diff:.2e}, relative {report.relative:.2e}."
    )


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
    written = open_hf_folder(aside)  # held to the rules of any other folder
    if reference_logits is None:
        for name, tensor in to_hf(source, shape):
            if not torch.equal(written.tensors[name], tensor.to("cpu", specs[name].dtype)):
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
    try:
        check_free_space(folder, num_bytes, "the exported weights")
    except DiskSpaceError as error:
        raise ExportError(str(error)) from error


def _move_into_place(aside: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old)
    else:
        os.replace(aside, folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
