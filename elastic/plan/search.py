"""Which layouts a run may have on a cluster, and which is fastest: legal by the run's own rules, then by memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from elastic.config.load import Problem
from elastic.config.rules import RULES, rule_problems
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ParallelConfig
from elastic.plan.config import PlanConfig
from elastic.plan.phases import PhasePlan, phase_plans
from elastic.plan.timing import StepTime, step_time
from elastic.space.reach import Sample


@dataclass(frozen=True)
class Candidate:
    """One layout and micro-batch, the phases on it, and how long each step takes."""

    parallel: ParallelConfig
    micro_batch: int
    plans: tuple[PhasePlan, ...]
    times: tuple[StepTime, ...]

    @property
    def name(self) -> str:
        """Return the layout in short."""
        return layout_name(self.parallel, self.micro_batch)

    @property
    def peak_bytes(self) -> int:
        """Return the peak over phases and stages."""
        return max(plan.peak_bytes for plan in self.plans)

    @property
    def seconds(self) -> float:
        """Return how long the whole curriculum takes."""
        return sum(plan.phase.num_steps * time.total for plan, time in zip(self.plans, self.times, strict=True))


@dataclass(frozen=True)
class Rejection:
    """A layout that is out: the rule it breaks in one word, and the whole reason."""

    name: str
    rule: str
    reason: str


def layout_name(parallel: ParallelConfig, micro_batch: int) -> str:
    """Write a layout in short, without what is 1."""
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "CP": parallel.context}
    parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] or ["TP1"]
    return " ".join([*parts, f"mb{micro_batch}", *(["recompute"] if parallel.recompute == "full" else [])])


def candidate(config: PlanConfig, parallel: ParallelConfig, micro_batch: int, samples: dict[str, Sample]) -> Candidate:
    """Plan every phase on a legal layout."""
    plans = phase_plans(config, parallel, micro_batch, samples)
    times = tuple(step_time(plan, config.cluster, config.plan) for plan in plans)
    return Candidate(parallel, micro_batch, plans, times)


def run_problems(config: PlanConfig) -> tuple[Problem, ...]:
    """List everything the run's own verb would refuse of the config on this cluster, inputs apart."""
    return rule_problems(config.run_config(config.parallel, config.data.micro_batch), _cluster(config))


def layout_rule_problems(config: PlanConfig, parallel: ParallelConfig, micro_batch: int) -> list[Problem]:
    """List what the run's own verb would refuse of a layout on this cluster."""
    run, cluster = config.run_config(parallel, micro_batch), _cluster(config)
    rules = [rule for rule in RULES if isinstance(run, rule.verbs) and "parallel" in rule.sections]
    return [problem for rule in rules for problem in rule.problems(run, cluster)]


def _cluster(config: PlanConfig) -> Cluster:
    return Cluster(num_processes=config.cluster.num_gpus, has_gpu=True)


@dataclass(frozen=True)
class Found:
    """What a search found: layouts that fit, the fastest first; why the others are out; and per phase the fastest
    layout that fits that phase, were it a run of its own (checkpoints reshard)."""

    fitting: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    alone: tuple[Candidate | None, ...]


def search(config: PlanConfig, samples: dict[str, Sample]) -> Found:
    """Try every layout, by the run's own rules, then by memory, then by time."""
    legal, rejected, fitting = [], [], []
    limit = config.cluster.budget_bytes
    for parallel, micro_batch in layouts(config):
        if problems := layout_rule_problems(config, parallel, micro_batch):
            name = layout_name(parallel, micro_batch)
            rejected.append(Rejection(name, _rule(problems[0]), str(problems[0])))
            continue
        one = candidate(config, parallel, micro_batch, samples)
        legal.append(one)
        if one.peak_bytes <= limit:
            fitting.append(one)
        else:
            reason = f"needs {one.peak_bytes / 1e9:.1f} GB of {limit / 1e9:.1f}"
            rejected.append(Rejection(one.name, "memory", reason))
    alone = []
    for number in range(len(config.curriculum)):
        fits = [one for one in legal if one.plans[number].peak_bytes <= limit]
        alone.append(min(fits, key=lambda one, number=number: one.times[number].total, default=None))  # type: ignore[misc]
    ranked = sorted(fitting, key=lambda one: (one.seconds, one.peak_bytes))
    return Found(tuple(ranked), tuple(rejected), tuple(alone))


def _rule(problem: Problem) -> str:
    """Return the field a problem is about, the entry of a list left out."""
    return problem.field.rpartition(".choices.")[0] or problem.field


def layouts(config: PlanConfig) -> Iterator[tuple[ParallelConfig, int]]:
    """List layouts by powers of two whose replicas fill the cluster; always with sequence parallelism."""
    cluster, depth = config.cluster, len(config.parent_shape().pattern)
    for tensor in _powers(min(8, cluster.gpus_per_node)):
        for pipeline in _powers(depth):
            for context in _powers(cluster.num_gpus):
                if cluster.num_gpus % (tensor * pipeline * context):
                    continue
                sizes = dict(tensor=tensor, pipeline=pipeline, context=context)
                for micro_batch in _powers(config.plan.max_micro_batch):
                    for recompute in ("none", "full"):
                        yield ParallelConfig(**sizes, sequence=tensor > 1, recompute=recompute), micro_batch


def largest_micro_batch(config: PlanConfig, plan: PhasePlan) -> int:
    """Return the most sequences of a phase that fit at once on its layout, 0 if not even one does."""
    sizes = range(1, plan.phase.global_batch + 1)
    too_large = (size for size in sizes if plan.changed(batch=size).peak_bytes > config.cluster.budget_bytes)
    return next(too_large, plan.phase.global_batch + 1) - 1


def _powers(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length()) if 1 << power <= largest]
