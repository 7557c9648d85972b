"""The dry run beside the plan: what the code was seen to do on fake tensors, and what the formulas say."""

from collections import Counter
from dataclasses import replace
from typing import Any

from rich.table import Table

from elastic.plan.config import PlanConfig
from elastic.plan.dry_run import Trace, fake_world, ranks_of_stages, trace_step
from elastic.plan.flops import stage_flops
from elastic.plan.memory import stage_activation_bytes, stage_memory
from elastic.plan.phases import PhasePlan
from elastic.plan.report import table
from elastic.plan.search import Candidate
from elastic.plan.traffic import micro_batch_traffic, step_traffic
from elastic.plan.work import KernelSet, MicroBatchWork
from elastic.space.space import Space


def rehearse(config: PlanConfig, space: Space, chosen: Candidate) -> list[dict[str, Any]]:
    """Trace first, a middle and last stage of every phase; return one row per phase, stage and quantity.

    A step has just the micro-batches that are alive at once on the stage under 1F1B: more only take longer.
    """
    rows = []
    for plan in chosen.plans:
        run = max(plan.shares, key=lambda share: share.weight).run
        for rank in ranks_of_stages(plan.layout, config.cluster.num_gpus):
            stage = rank * plan.layout.pipeline // config.cluster.num_gpus
            in_flight = plan.layout.pipeline - stage
            with fake_world(plan.layout, config.cluster.num_gpus, rank) as here:
                trace = trace_step(
                    run, space, here, micro_batches=in_flight, distill=config.distill, optim=config.optim
                )
            rows += comparison(plan, run, trace, in_flight, config.optim.use_distributed_optimizer)
    return rows


def comparison(
    plan: PhasePlan, run: MicroBatchWork, trace: Trace, count: int, distributed_optimizer: bool
) -> list[dict[str, Any]]:
    """Return plan and trace of one rank side by side, for a step of `count` micro-batches.

    A dry run has no optimizer, the stand-ins no FLOPs; the gather of new weights belongs to the optimizer.
    """
    stage = trace.stage
    memory = stage_memory(run, stage, count, plan.num_chunks)
    if trace.optimizer == 0:
        memory = replace(memory, optimizer=0)
    work = stage_flops(run, stage).total
    flops = count * (work.matmul if run.kernels is KernelSet.FUSED else work.total)
    found: dict[str, tuple[float, float]] = {
        "parameters": (memory.parameters, trace.parameters),
        "gradients": (memory.gradients, trace.gradients),
        "optimizer": (memory.optimizer, trace.optimizer),
        "teacher's states": (memory.teacher_hidden, trace.teacher_hidden),
        "activations of one micro-batch": (stage_activation_bytes(run, stage), trace.activations),
        "peak": (memory.total, trace.peak),
        "FLOPs": (flops, trace.flops),
    }
    sent = Counter({key: count * payload for key, payload in micro_batch_traffic(run, stage).items()})
    sent.update(step_traffic(run, stage, distributed_optimizer))
    del sent["dp", "all_gather"]
    found |= {" ".join(key): (sent[key], trace.traffic.get(key, 0)) for key in sorted({*sent, *trace.traffic})}
    return [
        {"phase": plan.phase.name, "stage": stage, "what": what, "plan": planned, "trace": traced}
        for what, (planned, traced) in found.items()
        if planned or traced
    ]


def rehearsal_table(rows: list[dict[str, Any]]) -> Table:
    """Render plan and trace side by side."""
    lines = []
    for row in rows:
        unit, name = (1e12, "TFLOP") if row["what"] == "FLOPs" else (1e9, "GB")
        ratio = f"{row['plan'] / row['trace']:.3f}" if row["trace"] else "-"
        numbers = (f"{row[key] / unit:.3f} {name}" for key in ("plan", "trace"))
        lines.append((f"{row['phase']}: {row['what']}", str(row["stage"]), *numbers, ratio))
    title = "dry run of one rank: micro-batches alive at once on its stage"
    return table(title, ("what", "stage", "plan", "trace", "plan / trace"), lines)
