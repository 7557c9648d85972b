"""The verb cost: what a run of the main job can reach and what it costs, from its config alone."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from elastic.config.latency import latency_notes
from elastic.config.verbs import CostConfig
from elastic.hf.config import ExportError, export_warnings, stock_notes
from elastic.space.axes import AXES, INNER_AXIS
from elastic.space.cost import MEASURED, Budget, Cost, Deployment, Metric, Widths, cost, subnet_cost
from elastic.space.latency import Machine
from elastic.space.reach import Sample, sample_subnet, smallest_subnet
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import Space
from elastic.verbs.members import subnet_summary
from elastic.verbs.parent import nested_parent
from elastic.verbs.report_file import check_output, print_table, table, write_output

TENSOR_PARALLEL = (1, 2, 4, 8)  # sizes a submodel is served at
COSTS = ("params", "weight_bytes", "kv_bytes", "ssm_bytes", "conv_bytes", "deploy_bytes", "flops_per_token")


def run_cost(config: CostConfig, console: Console) -> dict[str, Any]:
    """Print the parent, the extremes, the router's start and a sample subnet per budget; returns what cost.json holds.

    Reads no data and no weights: of a permuted parent, where one is given, only the record. Raises RecordError if that
    is of another model, OutputError for an output that exists already.
    """
    check_output(config)
    (_, space), deployment, budgets = nested_parent(config), config.elastic.deployment, config.budgets()
    samples = [sample_subnet(space, budget, deployment) for budget in budgets]
    report = {
        "deployment": asdict(deployment),
        "depth_ranking": list(space.depth_ranking),
        "parent": cost_values(subnet_cost(space.parent, Subnet.full(space.parent), deployment)),
        "router_start": cost_values(start_cost(space, deployment)),
        "smallest": cost_values(subnet_cost(space.parent, smallest_subnet(space), deployment)),
        "budgets": [budget_row(budget, sample, space) for budget, sample in zip(budgets, samples, strict=True)],
    }
    print_table(cost_table(report), console)
    if Metric.LATENCY_MS in report["parent"]:
        print_table(time_table(report), console)
    console.print(conditions(deployment), highlight=False, style="dim")
    console.print()
    print_table(sample_table(report, space.parent), console)
    for note in [*notes(report, config), *latency_notes(deployment, space, Machine.here())]:
        console.print(note, highlight=False)
    write_output(config, report, console)
    return report


def start_cost(space: Space, deployment: Deployment) -> Cost:
    """Return the expected cost where training starts: a fresh router gives about equal chances to all choices."""
    chances = {}
    for axis in space.elastic_axes():
        choices = len(space.axes[axis].choices)
        chances[axis] = torch.full((space.num_slots(axis), choices), 1.0 / choices, dtype=torch.float64)
    return cost(space.parent, Widths.expected(space, chances), deployment)


def cost_values(used: Cost) -> dict[str, int | float]:
    """Return a cost as plain numbers; expected costs become floats."""
    values = {name: getattr(used, name) for name in (*COSTS, Metric.STORED_PARAMS.value)}
    if used.latency_ms is not None:
        values |= {name: getattr(used, name) for name in MEASURED}
    return {name: float(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def budget_row(budget: Budget, sample: Sample, space: Space) -> dict[str, Any]:
    """Return one budget with its sample subnet, as it stands in cost.json."""
    shape = sample.subnet.shape(space.parent)
    found = {ranks: kernel_warnings(shape, ranks) for ranks in TENSOR_PARALLEL}
    return {
        "name": budget.name,
        "metric": str(budget.metric),
        "target": budget.limit,
        "tolerance": budget.tolerance,
        "cost_ratio": sample.ratio,
        "is_near": sample.is_near,
        **cost_values(sample.cost),
        "subnet": subnet_summary(sample.subnet),
        "kept": {kind.name: list(getattr(shape, AXES[axis].size)) for kind, axis in INNER_AXIS.items()},
        "kernel_warnings": {ranks: warnings for ranks, warnings in found.items() if warnings},
        "notes": stock_notes(shape),
    }


def kernel_warnings(shape: ModelShape, tensor_parallel: int) -> list[str]:
    """List what kernels serve badly or refuse of an exported shape, or why it cannot be exported."""
    try:
        return export_warnings(shape, tensor_parallel)
    except ExportError as error:
        return [str(error)]


def cost_table(report: dict[str, Any]) -> Table:
    """Render what the parent, the samples and the extremes cost."""
    headings = ("", "params", "weights", "KV", "SSM", "conv", "deployed", "FLOPs")
    return table("what the space can reach, and one sample subnet per budget", headings, _cost_lines(report, COSTS))


def time_table(report: dict[str, Any]) -> Table:
    """Render how long they take, by the table of the deployment."""
    return table("one pass, by times of layers", ("", "time", "tokens/s"), _cost_lines(report, MEASURED))


def _cost_lines(report: dict[str, Any], costs: Sequence[str]) -> list[tuple[str, ...]]:
    rows = {"parent": report["parent"], **{row["name"]: row for row in report["budgets"]}}
    rows |= {"router's start": report["router_start"], "smallest": report["smallest"]}
    return [(name, *(quantity(cost_name, row[cost_name]) for cost_name in costs)) for name, row in rows.items()]


def sample_table(report: dict[str, Any], parent: ModelShape) -> Table:
    """Render the sizes of the sample subnets."""
    rows = []
    for row in report["budgets"]:
        subnet, kept = row["subnet"], row["kept"]
        clean = [str(ranks) for ranks in TENSOR_PARALLEL if ranks not in row["kernel_warnings"]]
        cells = [row["name"], quantity(row["metric"], row["target"]), f"{row['cost_ratio']:.1%}"]
        cells += [f"{len(subnet['kept_layers'])} of {len(parent.pattern)}", str(subnet["hidden"]), span(kept["MLP"])]
        cells += [f"{span(kept['MAMBA'])} x {subnet['head_channels']}" if kept["MAMBA"] else "-"]
        rows.append([*cells, span(kept["ATTENTION"]), " ".join(clean) or "none"])
    headings = ("budget", "target", "used", "layers", "hidden", "FFN", "Mamba", "queries", "clean at TP")
    return table("sample subnet per budget", headings, rows)


def conditions(deployment: Deployment) -> str:
    """Say what deployed bytes and FLOPs are counted for."""
    return (
        f"deployed: {deployment.batch} x {deployment.length_tokens:,} tokens; bytes per element: "
        f"weights {deployment.weight_bytes:g}, KV {deployment.kv_bytes:g}, SSM {deployment.ssm_bytes:g}, "
        f"conv {deployment.conv_bytes:g}\nFLOPs: forward, per token of such a sequence"
    )


def notes(report: dict[str, Any], config: CostConfig) -> list[str]:
    """List what the tables do not say: budgets nothing comes near, sizes kernels dislike, and the layers that leave."""
    lines = []
    for row in report["budgets"]:
        if not row["is_near"]:
            lines.append(
                f"warning: budget {row['name']}: no subnet found within {100 * row['tolerance']:g}% of the target, the "
                f"nearest uses {100 * row['cost_ratio']:.7g}%; give the axes more choices"
            )
        if row["stored_params"] != row["params"]:
            stored = quantity(Metric.PARAMS, row["stored_params"])
            lines.append(
                f"{row['name']}: a Hugging Face folder stores {stored} parameters (padding, a tied head's copy)"
            )
        lines += [f"{row['name']}: {note}" for note in row["notes"]]
        # Of several sizes the smallest says enough: what is uneven there is uneven at its multiples.
        lines += [f"{row['name']}: {text}" for text in next(iter(row["kernel_warnings"].values()), [])]
    if config.elastic.space.depth is not None and config.init_from.permuted_parent is None:
        lines.append("depth: the last layers leave; init_from.permuted_parent=RUN takes the ranking by importance")
    return lines


def span(widths: list[int]) -> str:
    """Write the widths of a kind's kept layers: one number, or the smallest and the largest."""
    if not widths:
        return "-"
    low, high = min(widths), max(widths)
    return str(high) if low == high else f"{low}-{high}"


def quantity(name: str, value: float) -> str:
    """Write a cost in the unit of its name: parameters and FLOPs by thousands, bytes by 1024."""
    base, units = (1024.0, (" B", " KiB", " MiB", " GiB")) if name.endswith("_bytes") else (1000.0, ("", "K", "M", "B"))
    if name == Metric.FLOPS_PER_TOKEN:
        units = ("", "K", "M", "G")
    if name == Metric.LATENCY_MS:
        return f"{value:.4g} ms"
    power = 0
    while power + 1 < len(units) and value >= base:
        value, power = value / base, power + 1
    return (f"{value:.3f}" if name == Metric.PARAMS else f"{value:.4g}") + units[power]
