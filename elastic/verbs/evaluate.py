"""The verb evaluate: deterministic loss, perplexity and cost of every budget and of subnets given by hand."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elastic.config.sections import DistillConfig
from elastic.config.serving import EvaluateConfig
from elastic.data.stream import HeldOut, TokenStream, source_labels
from elastic.run.folder import open_run_folder
from elastic.space.axes import Axis
from elastic.space.cost import subnet_cost
from elastic.space.gates import Gates
from elastic.space.space import Space
from elastic.space.subnet import Subnet
from elastic.train.evaluation import HeldOutLoss, evaluate_subnets
from elastic.train.pipeline import PipelineRunner
from elastic.verbs.family import FamilyError, OpenFamily, open_configured
from elastic.world.files import write_json
from elastic.world.groups import model_layout, world

EVALUATION_FILE = "evaluation.json"


def run_evaluate(config: EvaluateConfig, console: Console) -> Path:
    """Evaluate and write evaluation.json; returns the run folder."""
    held_out = TokenStream(Path(config.data.path) / "validation")
    with world(model_layout(config.parallel, config.trainer), config.trainer.collective_timeout_s) as here:
        folder, _ = open_run_folder(config.exp_manager, asdict(config), here)
        family = open_configured(config, world=here, say=console.print)
        runner = PipelineRunner(here, family.load_model(here.layout), DistillConfig(kl_weight=0.0))
        losses = evaluate_subnets(
            runner,
            {
                member.name: member_gates(member.subnet, family.space, config.execution, here.device)
                for member in family.members
            },
            HeldOut(held_out, config.sequence_length),
            num_sequences=config.data.validation_sequences,
            micro_batch_size=config.data.micro_batch,
            world=here,
        )
        rows = [_row(family, index, losses[member.name]) for index, member in enumerate(family.members)]
        if here.is_main:
            write_json(folder / EVALUATION_FILE, {"checkpoint": str(family.checkpoint), "members": rows})
            console.print(evaluation_table(rows))
    return folder


def member_gates(subnet: Subnet, space: Space, execution: str, device: torch.device) -> Gates:
    """Return the gates that run `subnet` by slicing, or by full-size masks where the choices contain its widths."""
    if execution == "slice":
        return Gates.slice(subnet)
    return Gates.mask({axis: weights.to(device) for axis, weights in one_hot_weights(subnet, space).items()})


def one_hot_weights(subnet: Subnet, space: Space) -> dict[Axis, torch.Tensor]:
    """Return exact one-hot weights [slots, K] of a subnet of this space; raises FamilyError for one outside it."""
    weights, chosen = {}, {}
    for axis in space.elastic_axes():
        choices, widths = space.axes[axis].choices, subnet.axis_widths(axis)
        foreign = [width for width in widths if width not in choices]
        if foreign:
            raise FamilyError(f"execution = mask: {axis} width {foreign[0]} is not among the choices {list(choices)}")
        chosen[axis] = tuple(choices.index(width) for width in widths[: space.num_slots(axis)])
        weights[axis] = torch.nn.functional.one_hot(torch.tensor(chosen[axis]), len(choices)).float()
    masked = space.subnet(chosen)
    if masked.kept_layers != subnet.kept_layers or masked.shape(space.parent) != subnet.shape(space.parent):
        raise FamilyError(
            f"execution = mask: the choices of this checkpoint do not reach {subnet_summary(subnet)}; "
            f"use execution=slice"
        )
    return weights


def subnet_summary(subnet: Subnet) -> dict[str, Any]:
    """Return a subnet as plain JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(subnet).items()}


def evaluation_table(rows: list[dict[str, Any]]) -> Table:
    """Render the rows of evaluation.json."""
    table = Table(title="held-out loss per budget")
    for heading in ("name", "target", "used", "params", "loss", "perplexity", "deployed"):
        table.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    sources = source_labels(rows[0]["loss_by_source"]) if len(rows[0]["loss_by_source"]) > 1 else {}
    for label in sources.values():
        table.add_column(f"on {label}", justify="right", no_wrap=True)
    for row in rows:
        target = "-" if row["target"] is None else f"{row['target'] / 1e6:,.3f}M"
        used = "-" if row["cost_ratio"] is None else f"{row['cost_ratio']:.1%}"
        table.add_row(
            row["name"],
            target,
            used,
            f"{row['params'] / 1e6:,.3f}M",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['deploy_bytes'] / 2**20:,.1f} MiB",
            *(f"{row['loss_by_source'][source]:.4f}" for source in sources),
        )
    return table


def _row(family: OpenFamily, index: int, loss: HeldOutLoss) -> dict[str, Any]:
    member = family.members[index]
    cost = subnet_cost(family.space.parent, member.subnet, family.deployment)
    budget = member.budget
    return {
        "name": member.name,
        "metric": None if budget is None else str(budget.metric),
        "target": None if budget is None else budget.limit,
        "cost_ratio": None if budget is None else float(cost[budget.metric]) / budget.limit,
        "params": cost.params,
        "deploy_bytes": cost.deploy_bytes,
        "flops_per_token": cost.flops_per_token,
        "loss": loss.mean.cross_entropy,
        "loss_by_source": {source: mean.cross_entropy for source, mean in loss.by_source.items()},
        "perplexity": loss.mean.perplexity,
        "num_tokens": loss.mean.num_tokens,
        "subnet": subnet_summary(member.subnet),
    }
