"""The verb evaluate: deterministic loss, perplexity and cost of every budget and of subnets given by hand."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic.blend.sources import open_held_out, open_sources
from elastic.config.sections import DistillConfig
from elastic.config.verbs import EvaluateConfig
from elastic.data.held_out import source_labels
from elastic.model.quantised import QuantisationError
from elastic.run.folder import open_run_folder
from elastic.run.world import run_world
from elastic.space.cost import Metric, subnet_cost
from elastic.space.gates import Execution, Gates
from elastic.space.shape import Subnet
from elastic.train.evaluation import HeldOutLoss, evaluate_subnets
from elastic.train.pipeline import PipelineRunner
from elastic.verbs.members import Member, OpenCheckpoint, one_hot_weights, open_checkpoint, subnet_summary
from elastic.verbs.report_file import print_table, table
from elastic.world.files import first_few, write_json

EVALUATION_FILE = "evaluation.json"


def run_evaluate(config: EvaluateConfig, console: Console) -> Path:
    """Evaluate and write evaluation.json; returns the run folder."""
    held_out = open_sources(config.data, config.data.split)
    with run_world(config) as here:
        opened = open_checkpoint(config.init_from, config.budget_names, config.subnets, world=here, say=console.print)
        check_teacher(config, opened)
        gates = {member.name: Gates.slice(member.subnet) for member in opened.members}
        if config.execution is Execution.MASK:  # of full size, where the choices contain the widths
            for name, subnet in ((member.name, member.subnet) for member in opened.members):
                gates[name] = Gates.mask(one_hot_weights(subnet, opened.space, here.device))
        with open_run_folder(config.exp_manager, asdict(config), here) as folder:
            model = opened.load_model(here.layout)
            if config.teacher_precision == "fp8":
                model.quantise()
            runner = PipelineRunner(here, model, DistillConfig(kl_weight=0.0))
            data = open_held_out(config.data, held_out, config.sequence_length)
            size = config.data.validation_sequences, config.data.micro_batch
            losses = evaluate_subnets(runner, gates, data, *size, config.position_buckets)
            rows = [_row(opened, member, losses[member.name]) for member in opened.members]
            if here.is_main:
                origin = {"checkpoint": str(opened.checkpoint), "split": config.data.split}
                write_json(folder / EVALUATION_FILE, origin | {"members": rows})
                print_table(evaluation_table(rows, config.data.split), console)
                if config.position_buckets > 1:
                    print_table(position_table(rows, config.sequence_length), console)
    return folder


def check_teacher(config: EvaluateConfig, opened: OpenCheckpoint) -> None:
    """Raise QuantisationError if a subnet is to run in FP8, as only a whole teacher does."""
    whole = Subnet.full(opened.space.parent)
    cut = [member.name for member in opened.members if member.subnet != whole]
    if config.teacher_precision == "fp8" and (cut or config.execution is Execution.MASK):
        rule = "runs the whole parent alone, as a slice"
        found = f"execution is {config.execution}" if not cut else f"{first_few(cut)} are cut"
        remedy = "name one budget that keeps all, as in budget_names=[full], with execution=slice"
        raise QuantisationError(f"teacher_precision = fp8: {rule}, and {found}; {remedy}")


def evaluation_table(rows: list[dict[str, Any]], split: str = "validation") -> Table:
    """Render the rows of evaluation.json."""
    sources = source_labels(rows[0]["loss_by_source"]) if len(rows[0]["loss_by_source"]) > 1 else {}
    headings = ("name", "target", "used", "params", "loss", "perplexity", "deployed")
    lines = [
        (
            row["name"],
            "-" if row["target"] is None else _target(row["metric"], row["target"]),
            "-" if row["cost_ratio"] is None else f"{row['cost_ratio']:.1%}",
            f"{row['params'] / 1e6:,.3f}M",
            _number(row["loss"], 4),
            _number(row["perplexity"], 2),
            f"{row['deploy_bytes'] / 2**20:,.1f} MiB",
            *(_number(row["loss_by_source"][source], 4) for source in sources),
        )
        for row in rows
    ]
    kind = "test" if split == "test" else "held-out"
    return table(f"{kind} loss per budget", (*headings, *(f"on {label}" for label in sources.values())), lines)


def position_table(rows: list[dict[str, Any]], sequence_length: int) -> Table:
    """Render the loss by parts of the sequence; a heading is where a part begins."""
    count = len(rows[0]["loss_by_position"])
    headings = (f"from {-(-part * sequence_length // count)}" for part in range(count))
    lines = [(row["name"], *(_number(loss, 4) for loss in row["loss_by_position"])) for row in rows]
    return table("loss by position in the sequence", ("name", *headings), lines)


def _target(metric: str, value: float) -> str:
    return f"{value:.4g} ms" if metric == Metric.LATENCY_MS else f"{value / 1e6:,.3f}M"


def _number(value: float | None, digits: int) -> str:
    """Write a loss; none where no token counts."""
    return "-" if value is None else f"{value:.{digits}f}"


def _row(opened: OpenCheckpoint, member: Member, loss: HeldOutLoss) -> dict[str, Any]:
    cost = subnet_cost(opened.space.parent, member.subnet, opened.deployment)
    budget = member.budget
    return {
        "name": member.name,
        "metric": None if budget is None else str(budget.metric),
        "target": None if budget is None else budget.limit,
        "cost_ratio": None if budget is None else float(cost[budget.metric]) / budget.limit,
        "params": cost.params,
        "deploy_bytes": cost.deploy_bytes,
        "flops_per_token": cost.flops_per_token,
        "latency_ms": cost.latency_ms,
        "loss": loss.mean.cross_entropy,
        "loss_by_source": {source: mean.cross_entropy for source, mean in loss.by_source.items()},
        **({"loss_by_position": [part.cross_entropy for part in loss.by_position]} if loss.by_position else {}),
        "perplexity": loss.mean.perplexity,
        "num_tokens": loss.mean.num_tokens,
        "subnet": subnet_summary(member.subnet),
    }
