"""The verb import_hf: a stock nemotron_h folder becomes a Megatron-Core checkpoint of an (unordered) parent."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from elastic.checkpoint.contents import writing_folder
from elastic.checkpoint.find import checkpoint_folder, list_checkpoints
from elastic.checkpoint.record import Record
from elastic.checkpoint.stream import save_streamed, stored_bytes
from elastic.config.load import ConfigError, Problem, config_dict, load, load_with_problems
from elastic.config.rules_elastic import check_budgets
from elastic.config.rules_layout import nearest_divisor
from elastic.config.sections import ElasticSection, ExpManagerConfig, ModelConfig
from elastic.config.verbs import ElasticRunConfig, ImportConfig
from elastic.hf.export_settings import write_export_settings
from elastic.hf.folder import CONFIG_FILE, GENERATION_FILE, HfFolder, open_hf_folder
from elastic.hf.names import HfTensorError, hf_names, megatron_source
from elastic.hf.tensor_index import INDEX_FILE
from elastic.run.folder import FAMILY_FILE, RunFolderError, open_run_folder
from elastic.space.layers import parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape, ShapeError
from elastic.verbs.parent import DEFAULT_LANES, fill_from_parent, model_values
from elastic.world.files import check_free_space, remove

FAMILY_HEAD = """# @package _global_
# What a family of this parent may be, to edit. Any field of conf/train_elastic.yaml can be added.
# Command:  python recipes/train_elastic.py --config-dir=FOLDER --config-name=family data.path=DATA
#           init_from.permuted_parent=RUN
defaults: [train_elastic, _self_]
"""


def run_import(config: ImportConfig, console: Console) -> Path:
    """Stream the folder, tensor by tensor and in its own number formats, into a checkpoint; returns the run folder.

    Everything that can be checked without reading values is checked first. Stopped half-way, the same command goes on
    behind the last finished layer.
    """
    source = open_hf_folder(Path(config.source))
    for warning in source.warnings:
        console.print(f"note: {warning}")
    rows = math.ceil(source.shape.vocab / config.vocab_multiple) * config.vocab_multiple
    shape, checkpoint = source.shape.with_vocab(rows), checkpoint_folder(Path(config.exp_manager.run_dir), 0)
    exports = source.exports
    if rows > source.shape.vocab:
        console.print(f"note: vocabulary {source.shape.vocab} -> {rows}: rows of zeros, left out again by exports")
        exports = replace(exports, settings=replace(exports.settings, num_tokens=source.shape.vocab))
    dtypes = {name: exports.dtypes.of(hf_names(name)[0]) for name in parameter_names(shape)}
    total = stored_bytes(shape, dtypes)
    written = sum(path.stat().st_size for path in writing_folder(checkpoint).glob("*"))
    check_free_space(checkpoint, total - written, "the checkpoint")
    read, offered = megatron_source(source.tensors, source.shape), family_sections(config, shape)
    with open_run_folder(config.exp_manager, asdict(config), None, resume=True) as folder:
        if list_checkpoints(folder):
            raise RunFolderError(
                f"{folder} holds a whole checkpoint already. Choose another exp_manager.version, or set "
                f"exp_manager.overwrite=true to replace it"
            )
        if offered is not None:
            (folder / FAMILY_FILE).write_text(
                f"{FAMILY_HEAD}{yaml.safe_dump(offered, sort_keys=False, default_flow_style=None)}"
            )
        try:
            with transfer_progress(console) as bar:
                task = bar.add_task("importing", total=total)
                save_streamed(
                    checkpoint,
                    Record("parent", shape, provenance={"imported from": str(source.path)}),
                    dtypes,
                    lambda name: _filled_up(read(name), parameter_size(name, shape)[0]),
                    identity=f"{_identity(source)}, vocabulary of {rows} rows",
                    add_files=lambda into: write_export_settings(exports, into),
                    progress=lambda num_bytes: bar.advance(task, num_bytes),
                )
        except HfTensorError:
            remove(writing_folder(checkpoint))  # nobody goes on with a damaged folder
            raise
    console.print(f"{source.path} -> {checkpoint}", soft_wrap=True)
    console.print("\n".join(next_commands(source, folder, offered)), soft_wrap=True, markup=False, highlight=False)
    return folder


def family_sections(config: ImportConfig, shape: ModelShape) -> dict[str, Any] | None:
    """Return sections `model` and `elastic` of a run that makes a family of this parent, choices for shares; None where
    its layers of one kind differ in width, which no such run takes. Raises ConfigError.
    """
    try:
        values = {"model": config_dict(ModelConfig(**model_values(shape))), "elastic": dict(config.elastic)}
    except ShapeError:
        return None
    if isinstance(space := config.elastic.get("space"), Mapping):
        values["elastic"]["space"] = {**space, "lanes": space.get("lanes") or default_lanes(shape)}
    filled, problems, _ = fill_from_parent(ElasticRunConfig, values)
    section, wrong = load_with_problems(ElasticSection, filled["elastic"])
    if problems or wrong:
        raise ConfigError((*problems, *(replace(problem, field=f"elastic.{problem.field}") for problem in wrong)))
    return {"model": values["model"], "elastic": {name: config_dict(section)[name] for name in config.elastic}}


def default_lanes(shape: ModelShape) -> int:
    """Return the lanes nearest to the usual ones that divide the FFN widths."""
    width = math.gcd(*shape.ffn)
    return nearest_divisor(DEFAULT_LANES, width) if width % DEFAULT_LANES else DEFAULT_LANES


def next_commands(source: HfFolder, run_folder: Path, offered: Mapping[str, Any] | None = None) -> list[str]:
    """Return what to type from here to an exported family, with what this parent needs beside the defaults, and which
    of the budgets that are `offered` it cannot have.
    """
    unfit: list[Problem] = []
    if offered is not None and "budgets" in offered["elastic"]:
        unfit += check_budgets(load(ModelConfig, offered["model"]), load(ElasticSection, offered["elastic"]))
    lanes = "" if (number := default_lanes(source.shape)) == DEFAULT_LANES else f" lanes={number}"
    runs, data = run_folder.parent.parent, "data.path=data/own"
    there = "" if str(runs) == ExpManagerConfig.exp_dir else f" exp_manager.exp_dir={runs}"
    return [
        "next (sizes and choices come from the checkpoint):",
        f"  python recipes/prepare_data.py paths=[TEXTS] tokenizer_path={source.path} output_dir=data/own",
        f"  python recipes/estimate_importance.py {data} init_from.parent={run_folder}{lanes}{there}",
        f"  python recipes/train_elastic.py {data} init_from.permuted_parent={runs}/permuted_parent/version_0{there}",
        f"  python recipes/extract.py init_from.checkpoint={runs}/family/version_0{there}",
        *(f"but choose other budgets, for example budgets=halves: {problem}" for problem in unfit),
        f"for choices and budgets of your own, edit {run_folder / FAMILY_FILE} and add to train_elastic.py:",
        f"  --config-dir={run_folder} --config-name={Path(FAMILY_FILE).stem}",
    ]


def _filled_up(tensor: Tensor, num_rows: int) -> Tensor:
    """Return the tensor with rows of zeros up to `num_rows`: a vocabulary may have got more."""
    missing = num_rows - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def transfer_progress(console: Console) -> Progress:
    """Return a bar that counts bytes, their speed and the time that remains."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _identity(source: HfFolder) -> str:
    """Say which files a checkpoint is made from, so that an interrupted import never goes on with others."""
    described = {source.path / name for name in (CONFIG_FILE, GENERATION_FILE, INDEX_FILE)}
    files = {*source.tensors.files, *source.exports.tokenizer_files, *filter(Path.exists, described)}
    stats = [(path.name, path.stat()) for path in sorted(files)]
    listed = ", ".join(f"{name} {stat.st_size} bytes of {stat.st_mtime_ns}" for name, stat in stats)
    return f"import of {source.path.resolve()}: {listed}"
