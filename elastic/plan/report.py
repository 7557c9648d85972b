"""What a plan says, as plain values and as tables. GB are 10^9 bytes, FLOPs count a multiply and an add as two."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.table import Table

from elastic.plan.advice import spare_share
from elastic.plan.config import PlanConfig
from elastic.plan.phases import PhasePlan
from elastic.plan.search import Candidate, Found, Rejection, largest_micro_batch
from elastic.plan.timing import StepTime

MEMORY = ("parameters", "gradients", "optimizer", "teacher", "teacher_hidden", "activations", "working_set", "logits")
SECONDS_PER_DAY = 86400.0


def candidate_values(config: PlanConfig, chosen: Candidate) -> dict[str, Any]:
    """Return everything about one layout as plain values."""
    phases = [phase_values(config, plan, time) for plan, time in zip(chosen.plans, chosen.times, strict=True)]
    return {
        "layout": asdict(chosen.parallel) | {"micro_batch": chosen.micro_batch, "replicas": chosen.plans[0].replicas},
        "peak_gb": chosen.peak_bytes / 1e9,
        "spare": spare_share(config.cluster, chosen.peak_bytes),
        "phases": phases,
        **_bill(config, chosen.seconds, sum(phase["days_at_mfu"] for phase in phases) * SECONDS_PER_DAY),
    }


def candidate_summary(one: Candidate) -> dict[str, Any]:
    """Return a layout of the ranking in short."""
    steps = {plan.phase.name: time.total for plan, time in zip(one.plans, one.times, strict=True)}
    days = one.seconds / SECONDS_PER_DAY
    return {"name": one.name, "days": days, "peak_gb": one.peak_bytes / 1e9, "step_seconds": steps}


def phase_values(config: PlanConfig, plan: PhasePlan, time: StepTime) -> dict[str, Any]:
    """Return one phase on one layout: memory per stage, work, traffic, time."""
    cluster = config.cluster
    peak = cluster.num_gpus * cluster.peak_tflops * 1e12
    flops = plan.step_flops(recompute=False)
    steps = plan.phase.num_steps
    return {
        "name": plan.phase.name,
        "execution": str(plan.phase.execution),
        "micro_batches": plan.micro_batches,
        "memory_bytes": [
            asdict(plan.memory(stage)) | {"total": plan.memory(stage).total} for stage in range(plan.layout.pipeline)
        ],
        "largest_micro_batch": largest_micro_batch(config, plan),
        "step_flops": flops,
        "step_flops_with_recompute": plan.step_flops(recompute=True),
        "traffic_bytes": traffic_values(plan),
        "step_seconds": asdict(time) | {"total": time.total},
        "mfu": flops / (time.total * peak),
        "steps": steps,
        "days": steps * time.total / SECONDS_PER_DAY,
        "days_at_mfu": steps * flops / (peak * config.plan.mfu) / SECONDS_PER_DAY,
    }


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
        bill |= {
            f"days{suffix}": amount / SECONDS_PER_DAY,
            f"gpu_hours{suffix}": hours,
            f"price{suffix}": hours * price,
        }
    return bill


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Render rows under headings, all but the first column to the right."""
    found = Table(title=title)
    for number, heading in enumerate(headings):
        found.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    return found


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
    headings = ("", "runs", "batches", "PFLOP", "TP GB", "CP GB", "PP GB", "DP GB", "step", "MFU", "days", "mb fits")
    rows = []
    for phase in values["phases"]:
        sent: Counter[str] = Counter()
        for name, amount in phase["traffic_bytes"].items():
            sent[name.partition(" ")[0]] += amount
        row = [phase["name"], phase["execution"], str(phase["micro_batches"]), f"{phase['step_flops'] / 1e15:,.0f}"]
        row += [f"{sent[group] / 1e9:.1f}" for group in ("tp", "cp", "pp", "dp")]
        row += [f"{phase['step_seconds']['total']:.1f} s", f"{phase['mfu']:.0%}", f"{phase['days']:.1f}"]
        rows.append([*row, str(phase["largest_micro_batch"])])
    return table("one step: work of all GPUs, GB sent by one, seconds", headings, rows)


def time_table(chosen: Candidate) -> Table:
    """Render where the seconds of a step go, by phase."""
    parts = [part.name for part in fields(StepTime)]
    rows = [
        (plan.phase.name, *(f"{getattr(time, part):.2f}" for part in parts), f"{time.total:.2f}")
        for plan, time in zip(chosen.plans, chosen.times, strict=True)
    ]
    return table("seconds of a step, nothing overlapping", ("", *parts, "all"), rows)


def ranking_table(found: Sequence[Candidate], config: PlanConfig) -> Table:
    """Render the best layouts: days of the whole curriculum, peak, and where the time goes."""
    headings = ("layout", "days", "peak GB", "spare", "products", "memory", "TP", "CP", "DP", "bubble")
    rows = []
    for one in found[: config.plan.top]:
        seconds: Counter[str] = Counter()
        for plan, time in zip(one.plans, one.times, strict=True):
            for name, amount in asdict(time).items():
                seconds[name] += amount * plan.phase.num_steps
        seconds["bubble"] += seconds["pipeline"]
        peak, spare = one.peak_bytes / 1e9, spare_share(config.cluster, one.peak_bytes)
        shares = ("products", "elementwise", "tensor", "context", "data", "bubble")
        row = [one.name, f"{one.seconds / SECONDS_PER_DAY:.1f}", f"{peak:.1f}", f"{spare:.0%}"]
        rows.append([*row, *(f"{seconds[share] / one.seconds:.0%}" for share in shares)])
    title = f"fastest of {len(found)} layouts that fit on {config.cluster.num_gpus} GPUs"
    return table(title, headings, rows)


def alone_lines(found: Found) -> list[str]:
    """Say what each phase would gain as a run of its own, over the best layout for all."""
    lines = []
    for number, one in enumerate(found.alone):
        if one is None or not found.fitting:
            continue
        best, alone = found.fitting[0].times[number].total, one.times[number].total
        name = one.plans[number].phase.name
        lines.append(f"{name} alone: {one.name}, {alone:.1f} s a step, {best:.1f} s with {found.fitting[0].name}")
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
