"""The verb plan: memory, FLOPs, traffic, time and price of a run, other layouts, a rehearsal."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from elastic.config.load import ConfigError
from elastic.plan.advice import warnings
from elastic.plan.config import PlanConfig
from elastic.plan.phases import budget_samples
from elastic.plan.report import (
    alone_lines,
    bill_lines,
    candidate_summary,
    candidate_values,
    memory_table,
    ranking_table,
    rejection_lines,
    time_table,
    work_table,
)
from elastic.plan.search import Candidate, candidate, run_problems, search
from elastic.verbs.cost import cost_space
from elastic.verbs.report_file import check_output, write_output


def run_plan(config: PlanConfig, console: Console) -> dict[str, Any]:
    """Print the plan of the config's layout, warnings, and the ranked layouts; returns what `output` would hold.

    Raises ConfigError if the layout is not legal on this cluster, RecordError for a permuted parent of another model,
    and OutputError for an output that exists already.
    """
    check_output(config)
    space = cost_space(config)
    samples = budget_samples(config, space)
    report: dict[str, Any] = {"cluster": asdict(config.cluster), "assumed": asdict(config.plan)}
    # 1. The layout of the config.
    if problems := run_problems(config):
        raise ConfigError(problems)
    chosen = candidate(config, config.parallel, config.data.micro_batch, samples)
    report |= {"chosen": candidate_values(config, chosen), "warnings": warnings(config, chosen)}
    _print_chosen(console, config, chosen, report)
    # 2. The others.
    if config.plan.search:
        found = search(config, samples)
        report["found"] = [candidate_summary(one) for one in found.fitting]
        report["rejected"] = [asdict(one) for one in found.rejected]
        console.print(ranking_table(found.fitting, config))
        for line in [*alone_lines(found), *rejection_lines(found.rejected)]:
            console.print(line, highlight=False)
    # 3. The rehearsal.
    if config.plan.dry_run:
        from elastic.plan.dry_run import rehearsal_table, rehearse

        report["rehearsal"] = rehearse(config, space, chosen)
        console.print(rehearsal_table(report["rehearsal"]))
    write_output(config, report, console)
    return report


def _print_chosen(console: Console, config: PlanConfig, chosen: Candidate, report: dict[str, Any]) -> None:
    values, cluster = report["chosen"], config.cluster
    console.print(
        f"{chosen.name} on {cluster.num_gpus} x {cluster.gpu}: {values['layout']['replicas']} replicas, peak "
        f"{values['peak_gb']:.1f} GB + {cluster.reserved_gb:g} GB reserved of {cluster.memory_gb:g}, "
        f"{values['spare']:.0%} to spare",
        highlight=False,
    )
    console.print(memory_table(values))
    console.print(work_table(values))
    console.print(time_table(chosen))
    for line in [*bill_lines(values, config), *(f"warning: {text}" for text in report["warnings"])]:
        console.print(line, highlight=False)
