"""Open a stock `nemotron_h` folder: everything that can be wrong with it is found before a single value is read.

The folder comes from somebody else. Nothing of it is run: JSON and safetensors are read, code and pickles are not.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elastic.hf.config_read import checked_shape, import_warnings, settings_from_hf_config, special_token_problems
from elastic.hf.export_settings import DTYPE_NAMES, DtypeRule, ExportSettings, kind_of_tensor
from elastic.hf.fp8 import NVFP4_REFUSED, is_nvfp4, paired
from elastic.hf.names import HF_HEAD, hf_sizes, stored_names
from elastic.hf.safe_files import UnsafeFileError, listed, open_regular, read_json, shown
from elastic.hf.tensor_files import TensorFolder
from elastic.hf.tensor_index import StoredTensor, TensorScan, scan_tensors
from elastic.hf.tokenizer_files import find_tokenizer, tokenizer_problems
from elastic.space.shape import ModelShape
from elastic.world.files import first_few

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_MAX_CONFIG_BYTES = 1_000_000
_MOST_SHOWN = 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_QUANTISED = ("F8_", "F6_", "F4", "I", "U", "BOOL")
# What a tensor that does not belong says about the model it comes from, by marks in its name.
_FOREIGN = {
    "mixture of experts, which is not supported; use a dense parent": (".experts.", "shared_experts", ".gate."),
    "multi-token prediction, which is not supported; save the model without it": ("mtp",),
    "quantisation; dequantise the folder to bf16 first": ("_scale",),
}


class HfFolderError(ValueError):
    """A folder that is not a sound stock `nemotron_h` model; `problems` lists everything that is wrong with it."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.problems = tuple(problems)
        some = "".join(f"\n- {problem}" for problem in first_few(problems, _MOST_SHOWN))
        super().__init__(f"{folder} cannot be read as a nemotron_h model:{some}")


@dataclass(frozen=True)
class HfFolder:
    """A checked folder: its sizes, what it gives to its exports, and `tensors`, read one by one by `backbone.` name.

    `warnings` are for the user to see: what is computed otherwise here, not kept, or left alone.
    """

    path: Path
    shape: ModelShape
    exports: ExportSettings
    tensors: TensorFolder
    warnings: tuple[str, ...]


def open_hf_folder(folder: Path) -> HfFolder:
    """Check a stock folder completely, without reading or running anything of it but JSON and file headers.

    Config, index, shards, every tensor's name, size and format, special tokens and the tokenizer's vocabulary are
    compared with each other. Writes nothing. Raises HfFolderError with all problems at once.
    """
    if not folder.is_dir():
        raise HfFolderError(folder, [f"{folder} is not a folder"])
    try:
        return _open(folder)
    except OSError as error:
        raise HfFolderError(folder, [f"{error.filename or folder} cannot be read: {error.strerror}"]) from error


def _open(folder: Path) -> HfFolder:
    problems: list[str] = []
    config, shape, generation = _read(folder / CONFIG_FILE, problems, infinity_in=("time_step_limit",)), None, None
    if config is not None:
        shape, found = checked_shape(config)
        problems += [f"{CONFIG_FILE}: {problem}" for problem in found]
    if (folder / GENERATION_FILE).exists(follow_symlinks=False):
        generation = _read(folder / GENERATION_FILE, problems)
        if generation is not None and shape is not None:
            found = special_token_problems(generation, shape.vocab, is_generation=True)
            problems += [f"{GENERATION_FILE}: {problem}" for problem in found]
    tokenizer = find_tokenizer(folder)
    problems += tokenizer_problems(tokenizer, None if shape is None else shape.vocab)
    scan = scan_tensors(folder)
    problems += scan.problems
    if is_nvfp4(config, scan.tensors):
        raise HfFolderError(folder, [NVFP4_REFUSED])  # alone: nothing else of it would fit either
    stored, found, in_fp8 = paired(_by_file_name(scan, problems), config)
    problems += found
    rule = _checked_dtypes(stored, problems)
    if shape is not None and (stored or scan.unread):
        problems += _size_problems(stored, set(stored_names(scan.unread)), shape)
    if problems or config is None or shape is None or rule is None:
        raise HfFolderError(folder, problems or ["it holds no tensors"])
    exports = ExportSettings(rule, settings_from_hf_config(config, generation, read_license(folder)), tokenizer)
    opened = HfFolder(folder, shape, exports, TensorFolder(stored), warnings=())
    return replace(opened, warnings=(*import_warnings(config), *_warnings(opened, config), *in_fp8, *scan.warnings))


def read_license(folder: Path) -> dict[str, str]:
    """Return the license fields in the front matter of a folder's card, none if there is no readable card."""
    try:
        with open_regular(folder / CARD_FILE) as file:
            text = file.read(_MAX_CONFIG_BYTES).decode("utf-8", "replace")
    except UnsafeFileError:
        return {}
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    field = r"^(license(?:_name|_link)?): *[\"']?([\w.+/:@%?=&#~-]{1,500})[\"']? *\r?$"
    return dict(re.findall(field, front[1] if front else "", re.MULTILINE))


def _read(path: Path, problems: list[str], infinity_in: tuple[str, ...] = ()) -> dict[str, Any] | None:
    try:
        return read_json(path, _MAX_CONFIG_BYTES, infinity_in)
    except UnsafeFileError as error:
        problems.append(str(error))
        return None


def _by_file_name(scan: TensorScan, problems: list[str]) -> dict[str, StoredTensor]:
    """Return the tensors under their `backbone.` names; a loaded model's `model.` names are accepted, too."""
    names = stored_names(scan.tensors)
    if len(names) < len(scan.tensors):
        twice = [name for name in scan.tensors if name not in names.values()]
        problems.append(f"stored twice, under a name with model. and one with backbone.: {listed(twice)}")
    return {name: scan.tensors[stored] for name, stored in names.items()}


def _checked_dtypes(stored: Mapping[str, StoredTensor], problems: list[str]) -> DtypeRule | None:
    """Return the rule that the tensors of a folder follow, or None; what is wrong is added to `problems`.

    All matrices must have one format, fp32 or bf16; vectors (norms, biases, A_log, D, dt_bias) may be fp32 beside
    bf16, each kind in all layers alike. Matrices in FP8 take that of the others, bf16 if there are none.
    """
    foreign, matrices, kinds = defaultdict(set), defaultdict(set), defaultdict(set)
    plain = {name: tensor for name, tensor in stored.items() if tensor.scales is None}
    for name, tensor in plain.items():
        if tensor.dtype not in _DTYPES:
            foreign[tensor.dtype].add(name)
            continue
        kinds[kind_of_tensor(name)].add(tensor.dtype)
        if len(tensor.size) > 1:
            matrices[tensor.dtype].add(name)
    found = [
        f"{len(names)} tensors are {dtype} ({listed(names, 2)}), which {_remedy(dtype)}"
        for dtype, names in sorted(foreign.items())
    ]
    if len(matrices) > 1:
        mixed = "; ".join(f"{dtype}: {listed(names, 2)}" for dtype, names in sorted(matrices.items()))
        found.append(f"matrices have two number formats ({mixed}); save the model again in one")
    main = next(iter(matrices), "BF16" if len(plain) < len(stored) else None)
    if main is not None and not found:
        for kind, formats in kinds.items():
            if len(formats) > 1:
                found.append(f"{shown(kind)} is F32 in some layers, BF16 in others; save the model again in one format")
            elif main == "F32" and formats != {main}:
                found.append(f"{shown(kind)} is BF16 beside matrices in F32; save the model again in one format")
    problems += found
    if main is None or found:
        return None
    return DtypeRule(_DTYPES[main], {kind: _DTYPES[dtype] for kind, (dtype,) in kinds.items() if dtype != main})


def _remedy(dtype: str) -> str:
    if dtype == "F16":
        # Kept in bf16 they would lose bits, and checkpoints here are fp32 or bf16.
        return "checkpoints of this project cannot keep; load the model with dtype=torch.float32 and save it again"
    if dtype.startswith(_QUANTISED):
        return "is quantised; dequantise the folder to bf16 first"
    return "is not supported; save the model in F32 or BF16"


def _size_problems(stored: Mapping[str, StoredTensor], unread: set[str], shape: ModelShape) -> list[str]:
    """Compare names and sizes with the config's; tensors of shards that could not be read are not missed again."""
    sizes = hf_sizes(shape)
    optional = {HF_HEAD} if shape.tied_embeddings else set()
    missing = sizes.keys() - stored.keys() - unread - optional
    extra = (stored.keys() | unread) - sizes.keys()
    problems = [f"{len(missing)} tensors of the config are missing: {listed(missing)}"] if missing else []
    for what, marks in _FOREIGN.items():
        if foreign := {name for name in extra if any(mark in name for mark in marks)}:
            extra -= foreign
            problems.append(f"{len(foreign)} unexpected tensors belong to {what}: {listed(foreign)}")
    if extra:
        problems.append(f"{len(extra)} unexpected tensors, which the config does not describe: {listed(extra)}")
    return problems + [
        f"{name} is {shown(tensor.size)}, the config says {sizes[name]}"
        for name, tensor in stored.items()
        if name in sizes and tensor.size != sizes[name]
    ]


def _warnings(opened: HfFolder, config: Mapping[str, Any]) -> list[str]:
    warnings, paths = [], list(opened.path.iterdir())
    held, said = DTYPE_NAMES[opened.exports.dtypes.main], config.get("dtype", config.get("torch_dtype"))
    if isinstance(said, str) and (said := said.removeprefix("torch.")) != held:
        warnings.append(f"torch_dtype = {shown(said)}, but the tensors are {held}; exports say {held}")
    if opened.shape.tied_embeddings and HF_HEAD not in opened.tensors:
        warnings.append(
            f"tie_word_embeddings without {HF_HEAD}: stock transformers 5 does not tie nemotron_h and would start "
            f"from a random head; exports carry the embedding as the head"
        )
    if code := [path.name for path in paths if path.suffix in (".py", ".so", ".pyc")]:
        warnings.append(f"code is never run or copied: {listed(code)}")
    if strays := [path.name for path in paths if path.is_symlink() and _leads_away(path)]:
        warnings.append(
            f"links to files outside the folder: {listed(strays)}; what they lead to is read as part of the model, and "
            f"tokenizer files are copied into checkpoints and exports"
        )
    if not opened.exports.tokenizer_files:
        warnings.append("no tokenizer files: exports will have none either")
    return warnings


def _leads_away(link: Path) -> bool:
    """Tell whether a link leaves its folder for another place than the blobs of a Hugging Face cache."""
    home, target = link.parent.resolve(), link.resolve()
    return home != target.parent and home.parent.parent / "blobs" != target.parent
