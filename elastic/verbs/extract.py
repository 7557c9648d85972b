"""The verb extract: cut budgets out of a nested checkpoint, to Hugging Face folders, GGUF files and checkpoints.

Everything streams from the checkpoint's files to the exported ones, one tensor in memory, whatever layout trained it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor

from elastic.checkpoint.find import checkpoint_folder
from elastic.checkpoint.record import Record
from elastic.checkpoint.stream import save_streamed
from elastic.config.export import ExportConfig
from elastic.config.verbs import ExtractConfig
from elastic.hf.card import CardInfo
from elastic.hf.config import stock_notes
from elastic.hf.export import ExportReport, FolderCheck, export_folder
from elastic.hf.export_settings import DtypeRule, ExportSettings, kind_of_tensor, write_export_settings
from elastic.hf.fp8 import calibrate, cut_scales, hf_scales
from elastic.hf.gguf_tokenizer import check_tokenizer
from elastic.hf.names import hf_names
from elastic.hf.nested_values import value_check
from elastic.hf.reload import logit_check, reads_fp8
from elastic.hf.tokenizer_files import find_tokenizer
from elastic.rank.slicing import parent_parameter, submodel_source
from elastic.run.folder import open_run_folder
from elastic.space.cost import shape_cost
from elastic.space.layers import parameter_names
from elastic.verbs.extract_gguf import also_in_engines, export_member_gguf
from elastic.verbs.fp8_loss import (
    Fp8Loss,
    card_text,
    exported_values,
    fp8_losses,
    loss_table,
)
from elastic.verbs.import_hf import transfer_progress
from elastic.verbs.members import Member, OpenCheckpoint, open_checkpoint, subnet_summary
from elastic.verbs.report_file import print_table
from elastic.verbs.subnet_logits import subnet_logits
from elastic.verbs.text import text_settings
from elastic.world.files import write_json
from elastic.world.groups import DTYPES

EXTRACTION_FILE = "extraction.json"
_FP32_BYTES = 4
# Transient copies while a folder is loaded, activations and logits of the probe.
_HEADROOM = 1.25
_CGROUP = Path("/sys/fs/cgroup")


def run_extract(config: ExtractConfig, console: Console) -> Path:
    """Write one folder per member under the run folder and extraction.json; returns the run folder.

    Each Hugging Face folder has been reloaded in stock transformers and its logits compared with the subnet in the
    nested checkpoint before this returns, or, where memory does not allow it, every stored value with the parent's.
    """
    opened = open_checkpoint(config.init_from, config.budget_names, config.subnets, say=console.print)
    carried, dtypes, rows = _carried(opened, config), _stored_formats(opened), []
    if config.export.format == "gguf":
        check_tokenizer(carried)  # before anything is written
    with open_run_folder(config.exp_manager, asdict(config), None) as folder:
        fp8 = _fp8_of_family(opened, carried, config, console) if config.export.in_fp8 else None
        for member in opened.members:
            row: dict[str, Any] = {"name": member.name, "subnet": subnet_summary(member.subnet)}
            if config.export.hugging_face:
                report = _export_hugging_face(opened, member, folder / member.name, carried, fp8, config, console)
                row |= {
                    "hugging_face": str(report.folder),
                    "params": report.params,
                    "stored_params": report.stored_params,
                    "verification": report.outcome.verification,
                    "max_abs_logit_diff": report.outcome.max_abs_logit_diff,
                }
                if fp8 is not None and member.name in fp8.losses:
                    row["loss"], row["loss_fp8"] = fp8.losses[member.name].plain, fp8.losses[member.name].fp8
                row["engines"] = list(report.outcome.engines)
                notes = stock_notes(member.subnet.shape(opened.space.parent))
                console.print("\nnote: ".join([_line(member, report), *notes]))
            if config.export.format == "gguf":
                card, reference = _card(opened, member, config, None), subnet_logits(opened, member, dtypes)
                place = folder / f"{member.name}_gguf"
                report = export_member_gguf(opened, member, place, card, carried, config.export, reference, console)
                row |= {"gguf": str(report.folder), "params": report.params}
                row["engines"] = [*row.get("engines", []), *report.outcome.engines]
                console.print(_line(member, report))
            if config.export.megatron:
                row["megatron"] = str(_export_megatron(opened, member, folder / f"{member.name}_megatron", carried))
            if member.untrained is not None:
                row["untrained"] = member.untrained
                console.print(f"note: {member.name} is {member.untrained}", highlight=False)
            rows.append(row)
        write_json(folder / EXTRACTION_FILE, {"checkpoint": str(opened.checkpoint), "members": rows})
    return folder


def _carried(opened: OpenCheckpoint, config: ExtractConfig) -> ExportSettings:
    """Return settings, tokenizer and number formats of the exports: the config's, or those of the checkpoint."""
    settings, tokenizer = text_settings(opened.checkpoint, opened.record, config.data.path)
    precision = config.export.precision
    dtypes = _stored_formats(opened) if precision is None else DtypeRule.trained(DTYPES[precision])
    if config.export.in_fp8 and dtypes.main != torch.bfloat16:
        dtypes = DtypeRule.trained(torch.bfloat16)
    return ExportSettings(dtypes, settings, () if tokenizer is None else find_tokenizer(tokenizer))


def _stored_formats(opened: OpenCheckpoint) -> DtypeRule:
    """Return the number formats of the checkpoint's parameters as a rule over the exported tensors."""
    stored, parent = opened.tensors(), opened.space.parent
    main = stored.dtype(next(iter(stored)))
    others = {name: dtype for name in parameter_names(parent) if (dtype := stored.dtype(name)) != main}
    return DtypeRule(main, {kind_of_tensor(hf): dtype for name, dtype in others.items() for hf in hf_names(name)})


@dataclass(frozen=True)
class _Fp8Family:
    """One calibration of the nested parent (hf/fp8.py), and what FP8 costs each member, as far as that was measured."""

    calibrated: Mapping[str, Tensor]
    losses: Mapping[str, Fp8Loss]


def _fp8_of_family(
    opened: OpenCheckpoint, carried: ExportSettings, config: ExtractConfig, console: Console
) -> _Fp8Family:
    """Take the scales of all exports, and measure the loss where the nested parent fits in memory."""
    calibrated, losses = calibrate(opened.tensors(), opened.space.parent), dict[str, Fp8Loss]()
    if shape_cost(opened.space.parent).params * _FP32_BYTES * _HEADROOM <= available_memory_bytes():
        losses |= fp8_losses(opened, carried.dtypes, calibrated, config.data.path or opened.record.data)
        why = "no held-out tokens: name prepared data of this tokenizer in data.path"
    else:
        why = "the nested parent does not fit in this machine's memory in fp32"
    if losses:
        print_table(loss_table(losses), console)
    else:
        console.print(f"note: what FP8 costs in loss was not measured, {why}")
    return _Fp8Family(calibrated, losses)


def _export_hugging_face(
    opened: OpenCheckpoint,
    member: Member,
    folder: Path,
    carried: ExportSettings,
    fp8: _Fp8Family | None,
    config: ExtractConfig,
    console: Console,
) -> ExportReport:
    parent, lanes = opened.space.parent, opened.space.lanes
    check = choose_check(opened, member, carried.dtypes, config.export)
    with transfer_progress(console) as bar:
        task = bar.add_task(f"writing {member.name}", total=None)
        return export_folder(
            submodel_source(opened.tensors(), parent, member.subnet, lanes),
            member.subnet.shape(parent),
            folder,
            _card(opened, member, config, fp8),
            carried,
            check,
            config.export.shard_bytes,
            lambda num_bytes, total: bar.update(task, advance=num_bytes, total=total),
            None
            if fp8 is None
            else hf_scales(cut_scales(fp8.calibrated, parent, member.subnet, lanes), member.subnet.shape(parent)),
        )


def _card(opened: OpenCheckpoint, member: Member, config: ExtractConfig, fp8: _Fp8Family | None) -> CardInfo:
    return CardInfo(
        title=f"{config.exp_manager.name} {member.name}",
        parent=opened.space.parent,
        subnet=member.subnet,
        budget=member.budget,
        deployment=opened.deployment,
        provenance={
            "nested checkpoint": opened.checkpoint.name,
            **{k: str(v) for k, v in opened.record.provenance.items()},
            **({} if member.untrained is None else {"training": member.untrained}),
        },
        fp8=None if fp8 is None else card_text(fp8.losses.get(member.name), member.subnet.shape(opened.space.parent)),
    )


def _export_megatron(opened: OpenCheckpoint, member: Member, run_folder: Path, carried: ExportSettings) -> Path:
    """Write the submodel as a checkpoint of its own, which every verb opens like a parent."""
    parent, stored = opened.space.parent, opened.tensors()
    shape = member.subnet.shape(parent)
    record = Record("submodel", shape, data=opened.record.data, provenance={"cut from": str(opened.checkpoint)})
    save_streamed(
        checkpoint_folder(run_folder, 0),
        record,
        {name: stored.dtype(parent_parameter(name, member.subnet)) for name in parameter_names(shape)},
        submodel_source(stored, parent, member.subnet, opened.space.lanes),
        identity=f"{member.name} of {opened.checkpoint}",
        add_files=lambda into: write_export_settings(carried, into),
    )
    return run_folder


def _line(member: Member, report: ExportReport) -> str:
    difference = (
        f"{report.outcome.num_values:,} values"
        if report.outcome.max_abs_logit_diff is None
        else f"largest logit difference {report.outcome.max_abs_logit_diff:.1e}"
    )
    stored = f" ({report.stored_params:,} stored)" if report.stored_params != report.params else ""
    engines = "".join(f"\n  {sentence}" for sentence in report.outcome.engines)
    return (
        f"{member.name}: {report.params:,} parameters{stored} -> {report.folder} ({report.outcome.verification}; "
        f"{difference}){engines}"
    )


def choose_check(opened: OpenCheckpoint, member: Member, dtypes: DtypeRule, export: ExportConfig) -> FolderCheck:
    """Return the check of one member's folder; `auto` decides by the memory that is free now: logits where the nested
    parent and the reloaded submodel fit, both in fp32, with headroom.
    """
    parent, wanted, in_fp8 = opened.space.parent, export.own_checks[0], export.in_fp8
    reference = subnet_logits(opened, member, dtypes, in_fp8)
    if wanted == "auto" and in_fp8 and not reads_fp8():
        wanted = "values"
    if wanted == "auto":
        params = shape_cost(parent).params + shape_cost(member.subnet.shape(parent)).stored_params
        wanted = "logits" if params * _FP32_BYTES * _HEADROOM <= available_memory_bytes() else "values"
    if wanted == "values":
        stored = opened.tensors()
        check = value_check(
            lambda name: exported_values(stored[name], name, dtypes, in_fp8), parent, member.subnet, opened.space.lanes
        )
    else:
        check = logit_check(reference, export.max_logit_difference)
    rounded = subnet_logits(opened, member, dtypes, in_fp8, activations=True) if in_fp8 else None
    return also_in_engines(check, export, reference, rounded)


def available_memory_bytes() -> int:
    """Return the memory this process may still take: the machine's, or less in a container with a limit."""
    available = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return min(available, limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
