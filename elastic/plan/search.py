"""Which layouts a run may have on a cluster, and which is fastest: legal by the run's own rules, then by memory.

And the rules of thumb a layout breaks: nothing is refused for them, each costs speed or safety. The limits are ours.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from elastic.config.load import Problem
from elastic.config.rules import RULES, rule_problems
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ParallelConfig
from elastic.plan.config import PlanConfig
from elastic.plan.phases import PhasePlan, own_plans, phase_plans
from elastic.plan.work import FP32_BYTES, KernelSet
from elastic.space.reach import Sample
from elastic.world.groups import Layout, Recompute

MAX_BUBBLE, MAX_IMBALANCE, MAX_EXPOSED = 0.10, 0.15, 0.25
_RECOMPUTE: Mapping[Recompute, tuple[str, ...]] = {"none": (), "selective": ("selective",), "full": ("recompute",)}
MIN_LOCAL_COLUMNS, MIN_LOCAL_TOKENS, MAX_CHUNK_BYTES = 512, 1024, 1 << 30


@dataclass(frozen=True)
class Candidate:
    """The phases of a run, all on one layout or each on its own."""

    plans: tuple[PhasePlan, ...]

    @property
    def name(self) -> str:
        """Return the layout in short, or those of all phases where they differ."""
        return ", then ".join(dict.fromkeys(plan_name(plan) for plan in self.plans))

    @property
    def peak_bytes(self) -> int:
        """Return the peak over phases and stages."""
        return max(plan.peak_bytes for plan in self.plans)

    def warnings(self) -> list[str]:
        """List the rules of thumb that the layout breaks, each with what would help."""
        return [
            f"{plan.phase.name}: {text}"
            for plan in self.plans
            for text in (*_layout_warnings(plan), *_phase_warnings(plan))
        ]

    @property
    def seconds(self) -> float:
        """Return how long the whole curriculum takes."""
        return sum(plan.phase.num_steps * plan.time.total for plan in self.plans)


@dataclass(frozen=True)
class Rejection:
    """A layout that is out: the rule it breaks in one word, and the whole reason."""

    name: str
    rule: str
    reason: str


def plan_name(plan: PhasePlan) -> str:
    """Write the layout of one phase in short."""
    return layout_name(plan.layout, plan.shares[0].run.batch)


def layout_name(parallel: ParallelConfig | Layout, micro_batch: int) -> str:
    """Write a layout in short, without what is 1."""
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "CP": parallel.context}
    parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] or ["TP1"]
    return " ".join([*parts, f"mb{micro_batch}", *_RECOMPUTE[parallel.recompute]])


def candidate(config: PlanConfig, parallel: ParallelConfig, micro_batch: int, samples: dict[str, Sample]) -> Candidate:
    """Plan every phase on one legal layout."""
    return Candidate(phase_plans(config, parallel, micro_batch, samples))


def chosen(config: PlanConfig, samples: dict[str, Sample]) -> Candidate:
    """Plan every phase on the layout the config gives it, which must be legal."""
    return Candidate(own_plans(config, samples))


def run_problems(config: PlanConfig) -> tuple[Problem, ...]:
    """List everything the run's own verb would refuse of the config on this cluster, inputs apart, and what no plan
    counts yet.
    """
    problems = rule_problems(config.run_config(config.parallel, config.data.micro_batch), _cluster(config))
    if config.distill.teacher == "trained":
        rule = "trains the whole model beside each student, which no plan counts yet"
        problems += (Problem("distill.teacher", "trained", rule, "plan with frozen, and expect more time and memory"),)
    return problems


def layout_rule_problems(config: PlanConfig, parallel: ParallelConfig, micro_batch: int) -> list[Problem]:
    """List what the run's own verb would refuse of one layout for all phases on this cluster."""
    phases = tuple(replace(phase, parallel=None, micro_batch=None) for phase in config.curriculum)
    run, cluster = replace(config.run_config(parallel, micro_batch), curriculum=phases), _cluster(config)
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
            name, field = layout_name(parallel, micro_batch), problems[0].field
            rule = field.rpartition(".choices.")[0] or field  # the entry of a list left out
            rejected.append(Rejection(name, rule, str(problems[0])))
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
        alone.append(min(fits, key=lambda one, number=number: one.plans[number].time.total, default=None))  # type: ignore[misc]
    ranked = sorted(fitting, key=lambda one: (one.seconds, one.peak_bytes))
    return Found(tuple(ranked), tuple(rejected), tuple(alone))


def layouts(config: PlanConfig) -> Iterator[tuple[ParallelConfig, int]]:
    """List layouts by powers of two whose replicas fill the cluster; always with sequence parallelism."""
    cluster, depth = config.cluster, len(config.model.shape().pattern)
    sizes = product(_powers(min(8, cluster.gpus_per_node)), _powers(depth), _powers(cluster.num_gpus))
    for tensor, pipeline, context in sizes:
        if cluster.num_gpus % (tensor * pipeline * context) == 0:
            one = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context, sequence=tensor > 1)
            for micro_batch in _powers(config.plan.max_micro_batch):
                yield from ((replace(one, recompute=again), micro_batch) for again in _RECOMPUTE)


def largest_micro_batch(plan: PhasePlan) -> int:
    """Return the most sequences of a phase that fit at once on its layout, 0 if not even one does."""
    sizes = range(1, plan.phase.global_batch + 1)
    too_large = (size for size in sizes if plan.changed(batch=size).peak_bytes > plan.config.cluster.budget_bytes)
    return next(too_large, plan.phase.global_batch + 1) - 1


def _powers(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length()) if 1 << power <= largest]


def _field(plan: PhasePlan, name: str) -> str:
    """Name a field of a phase's layout: its own where the phase gives it, else the run's."""
    own = f"curriculum.{plan.config.curriculum.index(plan.phase)}." if name in plan.phase.own_layout else ""
    return f"{own}parallel.{name}"


def _layout_warnings(plan: PhasePlan) -> Iterator[str]:
    parallel, cluster = plan.layout, plan.config.cluster
    ranks, node = parallel.tensor * parallel.context, cluster.gpus_per_node
    if parallel.tensor > node:
        yield f"tensor parallelism over {parallel.tensor} ranks leaves the node of {node} GPUs"
    elif ranks > node:
        yield f"tensor x context = {ranks} ranks leave the node of {node} GPUs, so Mamba's exchange crosses the network"
    if parallel.tensor > 1 and not parallel.sequence:
        yield f"{_field(plan, 'sequence')}=false keeps the whole stream on every tensor-parallel rank; set it true"
    if plan.peak_bytes > cluster.budget_bytes:
        yield (
            f"peak {plan.peak_bytes / 1e9:.1f} GB leaves less than {cluster.spare:.0%} of {cluster.memory_gb:g} GB "
            f"beside {cluster.reserved_gb:g} GB of context, NCCL and allocator"
        )


def _phase_warnings(plan: PhasePlan) -> Iterator[str]:
    run, layout, stages, time = plan.shares[0].run, plan.layout, plan.layout.pipeline, plan.time
    if time.of("waiting") > MAX_BUBBLE * time.total:
        yield (
            f"{plan.micro_batches} micro-batches through {stages} stages leave "
            f"{time.of('waiting') / time.total:.0%} of the step waiting; fewer stages or replicas help"
        )
    work = [plan.flops(stage).total for stage in range(stages)]
    if max(work) > (1 + MAX_IMBALANCE) * sum(work) / stages:
        yield f"the slowest of {stages} stages has {max(work) * stages / sum(work) - 1:.0%} more work than the mean"
    for name, causes in (("context", ["context"]), ("data", ["gradients", "weights"]), ("tensor", ["tensor"])):
        if (seconds := time.of(*causes)) > MAX_EXPOSED * time.total:
            yield f"{name}-parallel traffic takes {seconds / time.total:.0%} of the step where nothing hides it"
    if run.tokens // layout.tensor < MIN_LOCAL_TOKENS:
        yield f"{run.tokens // layout.tensor} tokens of the stream on one rank are few; a larger micro-batch helps"
    for less in list(_RECOMPUTE)[: list(_RECOMPUTE).index(layout.recompute)]:
        if plan.changed(layout=replace(layout, recompute=less)).peak_bytes <= plan.config.cluster.budget_bytes:
            saves = "a forward pass" if layout.recompute == "full" else "reading activations again"
            yield f"fits with less recompute: {_field(plan, 'recompute')}={less} saves {saves}"
            break
    chunk = min(run.tokens, plan.config.distill.chunk_tokens) * run.local_vocab * FP32_BYTES
    if chunk > MAX_CHUNK_BYTES:
        yield f"a chunk of logits takes {chunk / 1e9:.2f} GB three times over; lower distill.chunk_tokens"
    yield from _width_warnings(plan)


def _width_warnings(plan: PhasePlan) -> Iterator[str]:
    """Yield widths that kernels serve badly on one rank."""
    for share in plan.shares:
        whole = replace(share.run, layout=replace(plan.layout, pipeline=1))
        for layer, _ in whole.distinct_layers(0):
            if layer.inner < MIN_LOCAL_COLUMNS:
                yield f"{share.budget}: {layer.inner} columns of a {layer.kind.name} layer on one rank are few"
            if layer.rows % 8:
                yield f"{share.budget}: {layer.rows} in_proj rows on one rank are no multiple of 8, as products prefer"
    length = plan.phase.sequence_length
    if length % (chunk := KernelSet.FUSED.chunk_tokens):
        yield f"sequence length {length} is not a multiple of the scan's chunk of {chunk} tokens"
