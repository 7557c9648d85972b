"""The verb plan: memory, FLOPs, traffic, time and price of a run, other layouts, a dry run; as plain values and tables.

GB are 10^9 bytes, FLOPs count a multiply and an add as two.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic.config.latency import latency_notes
from elastic.config.load import ConfigError
from elastic.plan.config import PlanConfig, with_measured
from elastic.plan.phases import PhasePlan, budget_samples
from elastic.plan.search import (
    Candidate,
    Found,
    Rejection,
    chosen,
    largest_micro_batch,
    plan_name,
    run_problems,
    search,
)
from elastic.plan.timing import CAUSES, PASSES, StepTime
from elastic.space.latency import Machine
from elastic.verbs.parent import nested_parent
from elastic.verbs.report_file import check_output, print_table, table, write_output

MEMORY = ("parameters", "gradients", "optimizer", "teacher", "teacher_hidden", "activations", "working_set", "logits")
SECONDS_PER_DAY = 86400.0


def run_plan(config: PlanConfig, console: Console) -> dict[str, Any]:
    """Print the plan of the config's layout, warnings, and the ranked layouts; returns what `output` would hold.

    Raises ConfigError if the layout is not legal on this cluster or `plan.measured` no measurement of its GPUs,
    RecordError for a permuted parent of another model, and OutputError for an output that exists already.
    """
    check_output(config)
    config, sources = with_measured(config)
    _, space = nested_parent(config)
    samples, deployment = budget_samples(config, space), config.elastic.deployment
    figures = {name: {"value": getattr(config.plan, name), "source": source} for name, source in sources.items()}
    report: dict[str, Any] = {"cluster": asdict(config.cluster), "plan": asdict(config.plan), "figures": figures}
    # 1. The config's own layouts.
    if problems := run_problems(config):
        raise ConfigError(problems)
    own = chosen(config, samples)
    report |= {"chosen": candidate_values(config, own), "warnings": own.warnings()}
    _print_chosen(console, config, own.name, report)
    if deployment.latency is not None:
        report["latency_ms"] = {name: sample.cost.latency_ms for name, sample in samples.items()}
        times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in report["latency_ms"].items())
        for line in [f"deployed: {times}", *latency_notes(deployment, space, Machine.here())]:
            console.print(line, highlight=False)
    # 2. The others.
    if config.plan.search:
        found = search(config, samples)
        report["found"] = [candidate_summary(one) for one in found.fitting]
        report["rejected"] = [asdict(one) for one in found.rejected]
        print_table(ranking_table(found.fitting, config), console)
        for line in [*alone_lines(found), *rejection_lines(found.rejected)]:
            console.print(line, highlight=False)
    # 3. The rehearsal.
    if config.plan.dry_run:
        from elastic.plan.dry_run import rehearse

        report["rehearsal"] = rehearse(config, space, own)
        print_table(rehearsal_table(report["rehearsal"]), console)
    write_output(config, report, console)
    return report


def _print_chosen(console: Console, config: PlanConfig, name: str, report: dict[str, Any]) -> None:
    values, cluster = report["chosen"], config.cluster
    replicas = ", then ".join(dict.fromkeys(str(phase["layout"]["replicas"]) for phase in values["phases"]))
    console.print(
        f"{name} on {cluster.num_gpus} x {cluster.gpu}: {replicas} replicas, peak "
        f"{values['peak_gb']:.1f} GB + {cluster.reserved_gb:g} GB reserved of {cluster.memory_gb:g}, "
        f"{values['spare']:.0%} to spare",
        highlight=False,
    )
    print_table(memory_table(values), console)
    print_table(work_table(values), console)
    for phase in values["phases"]:
        print_table(time_table(phase), console)
    lines = [*figure_lines(report["figures"]), *bill_lines(values, config)]
    for line in [*lines, *(f"warning: {text}" for text in report["warnings"])]:
        console.print(line, highlight=False)


def candidate_values(config: PlanConfig, one: Candidate) -> dict[str, Any]:
    """Return everything about the layouts of a run as plain values."""
    phases = [phase_values(plan) for plan in one.plans]
    return {
        "peak_gb": one.peak_bytes / 1e9,
        "spare": config.cluster.spare_share(one.peak_bytes),
        "phases": phases,
        **_bill(config, one.seconds, sum(phase["days_at_mfu"] for phase in phases) * SECONDS_PER_DAY),
    }


def candidate_summary(one: Candidate) -> dict[str, Any]:
    """Return a layout of the ranking in short."""
    steps, days = {plan.phase.name: plan.time.total for plan in one.plans}, one.seconds / SECONDS_PER_DAY
    return {"name": one.name, "days": days, "peak_gb": one.peak_bytes / 1e9, "step_seconds": steps}


def phase_values(plan: PhasePlan) -> dict[str, Any]:
    """Return one phase on one layout: memory per stage, work, traffic, time."""
    peak = plan.config.cluster.num_gpus * plan.config.cluster.peak_tflops * 1e12
    steps, time, flops = plan.phase.num_steps, plan.time, plan.model_flops(with_teacher=False)
    memory = [plan.memory(stage) for stage in range(plan.layout.pipeline)]
    layout = {name: value for name, value in asdict(plan.layout).items() if name != "dtype"}
    return {
        "name": plan.phase.name,
        "layout": layout | {"micro_batch": plan.shares[0].run.batch, "replicas": plan.replicas},
        "execution": str(plan.phase.execution),
        "micro_batches": plan.micro_batches,
        "memory_bytes": [asdict(stage) | {"total": stage.total} for stage in memory],
        "largest_micro_batch": largest_micro_batch(plan),
        "model_flops": flops,
        "step_flops": plan.step_flops(recompute=False),
        "step_flops_with_recompute": plan.step_flops(recompute=True),
        "traffic_bytes": traffic_values(plan),
        "step_seconds": {**seconds_by_cause(time), "total": {"all": time.total}},
        "mfu": flops / (time.total * peak),
        "mfu_with_teacher": plan.model_flops(with_teacher=True) / (time.total * peak),
        "steps": steps,
        "days": steps * time.total / SECONDS_PER_DAY,
        "days_at_mfu": steps * flops / (peak * plan.config.plan.mfu) / SECONDS_PER_DAY,
    }


def seconds_by_cause(time: StepTime) -> dict[str, dict[str, float]]:
    """Return the seconds of a step by cause, then by pass; "all" adds the passes up."""
    found: dict[str, dict[str, float]] = {}
    for cause in CAUSES:
        by_pass = {name: time.parts[name, cause] for name in PASSES if time.parts.get((name, cause))}
        if by_pass:
            found[cause] = by_pass | {"all": time.of(cause)}
    return found


def traffic_values(plan: PhasePlan) -> dict[str, float]:
    """Return the bytes one GPU sends in a step, of the busiest stage, by group and operation."""
    stages = []
    for stage in range(plan.layout.pipeline):
        sent = {key: amount * plan.micro_batches for key, amount in plan.sent_bytes(stage).items()}
        stages.append(sent | plan.sent_bytes_once(stage))
    busiest = max(stages, key=lambda sent: sum(sent.values()))
    return {" ".join(key): amount for key, amount in busiest.items()}


def _bill(config: PlanConfig, seconds: float, seconds_at_mfu: float) -> dict[str, float]:
    """Return days, GPU-hours and price, as estimated and at the stated utilisation."""
    gpus, price = config.cluster.num_gpus, config.cluster.price_per_gpu_hour
    bill: dict[str, float] = {}
    for suffix, amount in (("", seconds), ("_at_mfu", seconds_at_mfu)):
        hours = amount / 3600 * gpus
        bill |= {f"days{suffix}": amount / SECONDS_PER_DAY, f"gpu_hours{suffix}": hours}
        bill[f"price{suffix}"] = hours * price
    return bill


def memory_table(values: dict[str, Any]) -> Table:
    """Render GB per GPU by phase and pipeline stage."""
    headings = ("", "stage", "weights", "grads", "Adam", "teacher", "its states", "saved", "layer", "logits", "peak")
    rows = [
        (phase["name"], str(stage), *(f"{memory[name] / 1e9:.1f}" for name in (*MEMORY, "total")))
        for phase in values["phases"]
        for stage, memory in enumerate(phase["memory_bytes"])
    ]
    return table("GB on one GPU", headings, rows)


def work_table(values: dict[str, Any]) -> Table:
    """Render work, traffic and time of a step by phase."""
    headings = (
        "",
        "runs",
        "batches",
        "PFLOP",
        "TP GB",
        "CP GB",
        "PP GB",
        "DP GB",
        "step",
        "MFU",
        "+teacher",
        "days",
        "mb fits",
    )
    rows = []
    for phase in values["phases"]:
        sent: Counter[str] = Counter()
        for name, amount in phase["traffic_bytes"].items():
            sent[name.partition(" ")[0]] += amount
        row = [phase["name"], phase["execution"], str(phase["micro_batches"]), f"{phase['step_flops'] / 1e15:,.0f}"]
        row += [f"{sent[group] / 1e9:.1f}" for group in ("tp", "cp", "pp", "dp")]
        row += [f"{phase['step_seconds']['total']['all']:.1f} s", f"{phase['mfu']:.0%}"]
        row += [f"{phase['mfu_with_teacher']:.0%}", f"{phase['days']:.1f}", str(phase["largest_micro_batch"])]
        rows.append(row)
    return table("one step: work of all GPUs, GB sent by one, seconds", headings, rows)


def time_table(phase: dict[str, Any]) -> Table:
    """Render where the seconds of a phase's step go: a row for each cause, a column for each pass."""
    by_cause = phase["step_seconds"]
    sums = {name: sum(found.get(name, 0.0) for found in by_cause.values()) for name in PASSES}
    sums |= {"all": by_cause["total"]["all"]}
    rows = [
        (cause, *(f"{found[name]:.2f}" if found.get(name) else "" for name in (*PASSES, "all")))
        for cause, found in (by_cause | {"total": sums}).items()
    ]
    return table(f"{phase['name']}: seconds of a step on its busiest GPUs", ("", *PASSES, "all"), rows)


def figure_lines(figures: dict[str, dict[str, Any]]) -> list[str]:
    """State every figure that seconds rest on, and where it comes from; and what MFU counts."""
    lines = [f"{name} = {figure['value']:.3g}, {figure['source']}" for name, figure in figures.items()]
    return [*lines, "MFU counts the student's 6 N T + attention, +teacher also its 2 N T + attention; no recompute"]


def ranking_table(found: Sequence[Candidate], config: PlanConfig) -> Table:
    """Render the best layouts: days of the whole curriculum, peak, and where the time goes."""
    shares = {
        "products": ("products", "attention", "scan"),
        "memory": ("elementwise", "copies", "accumulation"),
        "launches": ("launches",),
        "TP": ("tensor",),
        "CP": ("context",),
        "DP": ("gradients", "weights"),
        "waiting": ("pipeline", "waiting"),
    }
    rows = []
    for one in found[: config.plan.top]:
        peak, spare = one.peak_bytes / 1e9, config.cluster.spare_share(one.peak_bytes)
        row = [one.name, f"{one.seconds / SECONDS_PER_DAY:.1f}", f"{peak:.1f}", f"{spare:.0%}"]
        for causes in shares.values():
            row.append(f"{sum(plan.time.of(*causes) * plan.phase.num_steps for plan in one.plans) / one.seconds:.0%}")
        rows.append(row)
    title = f"fastest of {len(found)} layouts that fit on {config.cluster.num_gpus} GPUs"
    return table(title, ("layout", "days", "peak GB", "spare", *shares), rows)


def alone_lines(found: Found) -> list[str]:
    """Say which layout is the best for each phase alone, and what it gains over the best one for all."""
    lines = []
    for number, one in enumerate(found.alone):
        if one is None or not found.fitting:
            continue
        best, plan = found.fitting[0], one.plans[number]
        seconds = f"{plan.time.total:.1f} s a step, {best.plans[number].time.total:.1f} s with {best.name}"
        lines.append(f"{plan.phase.name} alone: {plan_name(plan)}, {seconds}")
    return lines


def rejection_lines(rejected: Sequence[Rejection]) -> list[str]:
    """Group what is out by the rule it breaks, with one example each."""
    groups: defaultdict[str, list[Rejection]] = defaultdict(list)
    for one in rejected:
        groups[one.rule].append(one)
    return [
        f"out for {rule}: {len(group)} layouts, such as {group[0].name}: {_short(group[0].reason)}"
        for rule, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _short(reason: str, width: int = 90) -> str:
    """Cut a reason; the whole stands in the report."""
    return reason if len(reason) <= width else reason[: width - 3] + "..."


def bill_lines(values: dict[str, Any], config: PlanConfig) -> list[str]:
    """State days, GPU-hours and price."""
    price = config.cluster.price_per_gpu_hour
    return [
        f"{what}: {values[f'days{suffix}']:.1f} days, {values[f'gpu_hours{suffix}']:,.0f} GPU-hours, "
        f"{values[f'price{suffix}']:,.0f} dollars at {price:g} a GPU-hour (an assumption)"
        for what, suffix in (("as estimated", ""), (f"at {config.plan.mfu:.0%} MFU", "_at_mfu"))
    ]


def rehearsal_table(rows: list[dict[str, Any]]) -> Table:
    """Render plan and trace side by side."""
    lines = []
    for row in rows:
        unit, name = {"FLOPs": (1e12, "TFLOP"), "kernels": (1e3, "thousand")}.get(row["what"], (1e9, "GB"))
        ratio = f"{row['plan'] / row['trace']:.3f}" if row["trace"] else "-"
        numbers = (f"{row[key] / unit:.3f} {name}" for key in ("plan", "trace"))
        lines.append((f"{row['phase']}: {row['what']}", str(row["stage"]), *numbers, ratio))
    title = "dry run of one rank: micro-batches alive at once on its stage"
    return table(title, ("what", "stage", "plan", "trace", "plan / trace"), lines)
