"""Write a model as a Hugging Face folder, reload it, compare, and only then call it done."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from elastic.hf.card import CardInfo, model_card
from elastic.hf.config import ExportError, generation_config, hf_config
from elastic.hf.export_settings import ExportSettings
from elastic.hf.folder import CARD_FILE, CONFIG_FILE, GENERATION_FILE, HfFolder, HfFolderError, open_hf_folder
from elastic.hf.fp8 import QUANTISATION, fp8_plan, fp8_tensors
from elastic.hf.names import HfTensorError, hf_sizes, to_hf
from elastic.hf.safe_files import UnsafeFileError
from elastic.hf.tensor_files import planned, write_tensors
from elastic.hf.tokenizer_files import copy_tokenizer_files, tokenizer_problems
from elastic.rank.slicing import TensorSource, reader
from elastic.space.cost import shape_cost
from elastic.space.layers import DimKind, parameter_dims
from elastic.space.shape import ModelShape
from elastic.world.files import DiskSpaceError, check_free_space, remove, written_aside


@dataclass(frozen=True)
class CheckOutcome:
    """How a folder was checked, in short and in the sentence of its card, and what was found: the largest difference of
    logits, absolute and relative, or the number of values compared. `engines`: what each engine said, a sentence each.
    """

    verification: str
    sentence: str
    max_abs_logit_diff: float | None = None
    relative: float | None = None
    num_values: int | None = None
    engines: tuple[str, ...] = ()


# Judges the folder of a model of a shape when it is written but not yet in its place (reload.py, nested_values.py);
# raises ExportError if it is not what was meant to be written.
FolderCheck = Callable[[HfFolder, ModelShape], CheckOutcome]


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
    exports: ExportSettings,
    check: FolderCheck,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] = lambda num_bytes, total: None,
    scales: Mapping[str, Tensor] | None = None,
) -> ExportReport:
    """Write `shape`'s tensors, given under Megatron-Core names, as a stock `nemotron_h` folder.

    Streams: one tensor in memory. Written aside and renamed once `check` has passed; a failed export leaves nothing
    behind. Rows that only fill the vocabulary up are left out. `shard_bytes` bounds one weights file; `progress` is
    told the bytes of each tensor that is written, and of all. With `scales` (fp8.py) the matrices of its layers are
    written in FP8. Raises ExportError.
    """
    without_fillers, exported = unfilled(source, shape, exports)

    def write(aside: Path) -> CheckOutcome:
        write_tensors(aside, plan, tensors, shard_bytes, progress)
        for name, content in texts.items():  # time_step_limit ends at Infinity, as in published configs
            (aside / name).write_text(json.dumps(content, indent=2) + "\n")
        copy_tokenizer_files(exports.tokenizer_files, aside)
        outcome = check(open_hf_folder(aside), exported)  # and the folder is held to the rules of any other
        (aside / CARD_FILE).write_text(model_card(card, exported, exports, outcome.sentence, num_bytes))
        return outcome

    with export_errors(folder):
        texts = {
            CONFIG_FILE: hf_config(exported, exports.settings, exports.dtypes.main),
            GENERATION_FILE: generation_config(exports.settings, exported),
        }
        plan = {name: planned(size, exports.dtypes.of(name)) for name, size in hf_sizes(exported).items()}
        tensors = to_hf(without_fillers, exported)
        if scales is not None:
            texts[CONFIG_FILE] |= {"quantization_config": QUANTISATION}
            plan, tensors = fp8_plan(plan, scales), fp8_tensors(tensors, scales)
        num_bytes = sum(tensor.nbytes for tensor in plan.values())
        outcome = written_and_checked(folder, num_bytes, exports, exported.vocab, write)
    cost = shape_cost(exported)
    return ExportReport(folder, int(cost.params), int(cost.stored_params), outcome)


def unfilled(
    source: TensorSource, shape: ModelShape, exports: ExportSettings
) -> tuple[Callable[[str], Tensor], ModelShape]:
    """Return source and shape without the rows that an import filled the vocabulary up with."""
    read, exported = reader(source), shape.with_vocab(min(shape.vocab, exports.settings.num_tokens or shape.vocab))

    def without_fillers(name: str) -> Tensor:
        return read(name)[: exported.vocab] if parameter_dims(name)[0] is DimKind.VOCAB else read(name)

    return without_fillers, exported


@contextmanager
def export_errors(folder: Path) -> Iterator[None]:
    """Name the folder in whatever an export says is wrong: an ExportError."""
    try:
        yield
    except (UnsafeFileError, HfFolderError, HfTensorError, DiskSpaceError, ExportError) as error:
        raise ExportError(f"export to {folder}: {error}") from error


def written_and_checked(
    folder: Path, num_bytes: int, exports: ExportSettings, vocab: int, write: Callable[[Path], CheckOutcome]
) -> CheckOutcome:
    """Run `write`, which writes and checks, on a folder aside that takes `folder`'s place when it returns.

    Before: the folder must be free, the disk have room for `num_bytes`, and the tokenizer fit `vocab`.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise ExportError(f"folder {folder} is not empty; choose another one or set overwrite")
    check_free_space(folder, num_bytes, "the exported weights")
    if problems := tokenizer_problems(exports.tokenizer_files, vocab):
        raise ExportError("; ".join(problems))
    for left in folder.parent.glob(f".{folder.name}.partial-*"):  # by a killed export
        remove(left)
    with written_aside(folder) as aside:
        aside.mkdir()
        return write(aside)
