"""Write a model as a Hugging Face folder, reload it, compare, and only then call it done."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.hf.card import CardInfo, model_card
from elastic.hf.check import CheckOutcome, FolderCheck
from elastic.hf.config import ExportError, HfSettings, generation_config, hf_config
from elastic.hf.dtypes import DtypeRule
from elastic.hf.folder import CARD_FILE, CONFIG_FILE, GENERATION_FILE, HfFolderError, open_hf_folder
from elastic.hf.names import HfTensorError, hf_sizes, to_hf
from elastic.hf.reload import ReloadError
from elastic.hf.tensor_files import TensorSpec, write_tensors
from elastic.hf.tensor_index import TensorFileError
from elastic.hf.tokenizer_files import TokenizerFileError, copy_tokenizer
from elastic.rank.slicing import TensorSource, reader
from elastic.space.cost import shape_cost
from elastic.space.layers import parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape
from elastic.world.files import DiskSpaceError, check_free_space, remove, written_aside


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
    """What was written and how it was checked; `params` and `stored_params`: space/cost.py."""

    folder: Path
    params: int
    stored_params: int
    outcome: CheckOutcome


def export_folder(
    source: TensorSource,
    shape: ModelShape,
    folder: Path,
    card: CardInfo,
    options: ExportOptions,
    check: FolderCheck,
    progress: Callable[[int, int], None] = lambda num_bytes, total: None,
) -> ExportReport:
    """Write `shape`'s tensors, given under Megatron-Core names, as a stock `nemotron_h` folder.

    Streams: one tensor in memory. Written aside and renamed once `check` has passed; a failed export leaves nothing
    behind. Rows that only fill the vocabulary up are left out. `progress` is told the bytes of each tensor that is
    written, and of all. Raises ExportError.
    """
    folder, rule = Path(folder), options.rule
    source, shape = _without_fillers(source, shape, options.settings.exported(shape)), options.settings.exported(shape)
    specs = {name: TensorSpec(size, rule.of(name)) for name, size in hf_sizes(shape).items()}
    total = sum(spec.num_bytes for spec in specs.values())
    _check_target(folder, total, options.overwrite)
    for left in folder.parent.glob(f".{folder.name}.partial-*"):  # by a killed export
        remove(left)
    try:
        with written_aside(folder) as aside:
            aside.mkdir()
            write_tensors(aside, specs, _reported(to_hf(source, shape), specs, total, progress), options.shard_bytes)
            _write_json(aside / CONFIG_FILE, hf_config(shape, options.settings, rule.main))
            _write_json(aside / GENERATION_FILE, generation_config(options.settings, shape))
            copy_tokenizer(options.tokenizer_folder, aside, shape.vocab)
            outcome = check(open_hf_folder(aside), shape)  # and the folder is held to the rules of any other
            text = model_card(card, shape, str(rule.main).removeprefix("torch."), str(outcome))
            (aside / CARD_FILE).write_text(text)
    except (TensorFileError, TokenizerFileError, HfFolderError, HfTensorError, ReloadError, ExportError) as error:
        raise ExportError(f"export to {folder}: {error}") from error
    cost = shape_cost(shape)
    return ExportReport(folder, int(cost.params), int(cost.stored_params), outcome)


def _without_fillers(source: TensorSource, shape: ModelShape, exported: ModelShape) -> TensorSource:
    """Return the source of the exported shape, which has fewer rows of the vocabulary or equally many."""
    read = reader(source)
    sizes = {name: parameter_size(name, exported) for name in parameter_names(shape)}
    return lambda name: read(name)[: exported.vocab] if sizes[name] != parameter_size(name, shape) else read(name)


def _reported(
    tensors: Iterator[tuple[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    total: int,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    """Hand each tensor on, and report it when the next is asked for: it is written then."""
    for name, tensor in tensors:
        yield name, tensor
        del tensor  # before the next one is read
        progress(specs[name].num_bytes, total)


def _check_target(folder: Path, num_bytes: int, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ExportError(f"folder {folder} is not empty; choose another one or set overwrite")
    try:
        check_free_space(folder, num_bytes, "the exported weights")
    except DiskSpaceError as error:
        raise ExportError(str(error)) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")  # time_step_limit ends at Infinity, as in published configs
