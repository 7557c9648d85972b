"""The verb extract: cut budgets out of a nested checkpoint, to Hugging Face folders and Megatron-Core checkpoints."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from elastic.compress.export import ExportOptions, ExportReport, export_folder
from elastic.compress.hf_config import HfSettings
from elastic.compress.model_card import CardInfo
from elastic.compress.slicing import submodel_source
from elastic.modules.initialize import named_global_parameters
from elastic.modules.model import build_model
from elastic.space.axes import Space
from elastic.space.cost import shape_cost
from elastic.space.gates import Gates
from elastic.train.checkpoint import Trainable, save_checkpoint
from elastic.train.config import ExtractConfig
from elastic.train.family import Member, OpenFamily, open_family
from elastic.train.manifest import read_manifest
from elastic.train.parallel import DTYPES, World, model_layout, world
from elastic.train.record import Record
from elastic.train.run_evaluate import subnet_summary
from elastic.train.run_folder import open_run_folder, write_json

EXTRACTION_FILE = "extraction.json"


def run_extract(config: ExtractConfig, console: Console) -> Path:
    """Write one folder per member under the run folder and extraction.json; returns the run folder.

    Each Hugging Face folder has been reloaded in stock transformers and its logits compared with the subnet in the
    nested checkpoint before this returns.
    """
    with world(model_layout(config.parallel, config.trainer)) as here:
        folder, _ = open_run_folder(config.exp_manager, asdict(config), here)
        source = config.init_from
        family = open_family(source.checkpoint, source.router, config.budgets, config.subnets, here.layout)
        data = config.data.path or family.record.data
        rows = []
        for member in family.members:
            row: dict[str, Any] = {"name": member.name, "subnet": subnet_summary(member.subnet)}
            if config.export.hugging_face:
                report = _export_hugging_face(family, member, folder / member.name, data, config)
                row |= {
                    "hugging_face": str(report.folder),
                    "params": report.params,
                    "deployed_params": report.deployed_params,
                    "verification": str(report.verification),
                    "max_abs_logit_diff": report.max_abs_logit_diff,
                }
                console.print(_line(member, report))
            if config.export.megatron:
                row["megatron"] = str(_export_megatron(family, member, folder / f"{member.name}_megatron", here))
            rows.append(row)
        write_json(folder / EXTRACTION_FILE, {"checkpoint": str(family.checkpoint), "members": rows})
    return folder


def _tensors(family: OpenFamily) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in named_global_parameters(family.model)}


def _export_hugging_face(
    family: OpenFamily, member: Member, folder: Path, data: str | None, config: ExtractConfig
) -> ExportReport:
    gates = Gates.slice(member.subnet)

    @torch.no_grad()
    def subnet_logits(tokens: Tensor) -> Tensor:
        """Run the subnet inside the nested model, fp32: tokens [B, S] -> logits [B, S, V]."""
        hidden = family.model.eval()(tokens, gates)
        return (hidden @ family.model.head_weight(gates).t()).float().transpose(0, 1)

    tokenizer, settings = None, HfSettings()
    if data is not None:
        tokenizer, end_of_text = Path(data), read_manifest(Path(data)).tokenizer.eos_id
        settings = HfSettings(bos_token_id=None, eos_token_id=end_of_text, pad_token_id=end_of_text)
    card = CardInfo(
        title=f"{config.exp_manager.name} {member.name}",
        parent=family.space.parent,
        subnet=member.subnet,
        budget=member.budget,
        deployment=family.deployment,
        provenance={
            "nested checkpoint": family.checkpoint.name,
            **{k: str(v) for k, v in family.record.provenance.items()},
        },
    )
    options = ExportOptions(
        dtype=DTYPES[config.export.precision], settings=settings, tokenizer_folder=tokenizer, overwrite=False
    )
    return export_folder(
        submodel_source(_tensors(family), family.space.parent, member.subnet, family.space.lanes),
        member.subnet.shape(family.space.parent),
        folder,
        card,
        options,
        subnet_logits,
        config.export.max_logit_difference,
    )


def _export_megatron(family: OpenFamily, member: Member, run_folder: Path, here: World) -> Path:
    """Write the submodel as a checkpoint of its own, which every verb opens like a parent."""
    shape = member.subnet.shape(family.space.parent)
    submodel = build_model(Space(shape, {}, lanes=1), here.layout)
    source = submodel_source(_tensors(family), family.space.parent, member.subnet, family.space.lanes)
    with torch.no_grad():
        for name, parameter in named_global_parameters(submodel):
            parameter.copy_(source(name))
    assert sum(parameter.numel() for parameter in submodel.parameters()) == shape_cost(shape).params
    checkpoint = run_folder / "checkpoints" / "step_00000000"
    record = Record("submodel", shape, data=family.record.data, provenance={"cut from": str(family.checkpoint)})
    save_checkpoint(checkpoint, Trainable(submodel), record, None, here)
    return run_folder


def _line(member: Member, report: ExportReport) -> str:
    difference = (
        "every stored value checked"
        if report.max_abs_logit_diff is None
        else f"largest logit difference {report.max_abs_logit_diff:.1e}"
    )
    return f"{member.name}: {report.params:,} parameters -> {report.folder} ({report.verification}; {difference})"
