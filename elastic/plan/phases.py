"""One phase of a curriculum on one layout: the micro-batches it is made of, their memory, work, traffic and time.

How long a step takes is a model of assumed efficiencies, good for ranking layouts, not measured. Nothing is assumed to
overlap: products, elementwise work over GPU memory, tensor-, context- and data-parallel traffic follow each
other on a rank; stages work at the pace of the slowest (1F1B: m + p - 1 turns for m micro-batches).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from elastic.config.sections import ParallelConfig
from elastic.plan.config import PlanConfig
from elastic.plan.flops import Flops, stage_flops
from elastic.plan.memory import StageMemory, saved_bytes, stage_memory
from elastic.plan.traffic import micro_batch_traffic, moved_bytes, step_traffic
from elastic.plan.work import FP32_BYTES, KernelSet, MicroBatchWork
from elastic.router.phases import ElasticPhase
from elastic.run.world import model_layout
from elastic.space.reach import Sample, sample_subnet
from elastic.space.shape import Subnet
from elastic.space.space import Space
from elastic.world.groups import Layout

# Ours: a saved tensor is written once and read about twice in forward; backward moves about twice that. The loss
# passes over its fp32 chunks about this many times.
_PASSES, _BACKWARD_PASSES, _LOSS_PASSES = 3, 6, 16
_GROUPS = {"tp": "tensor", "cp": "context", "pp": "pipeline"}


@dataclass(frozen=True)
class Share:
    """A part of a phase's micro-batches: those of one budget, all alike."""

    budget: str
    weight: float
    run: MicroBatchWork


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they go to; `bubble` is the wait for other stages."""

    products: float
    elementwise: float
    tensor: float
    context: float
    pipeline: float
    data: float
    bubble: float

    @property
    def total(self) -> float:
        """Return the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class PhasePlan:
    """One phase on one layout: its micro-batches by budget, and how many a replica runs in a step."""

    config: PlanConfig
    phase: ElasticPhase
    shares: tuple[Share, ...]
    micro_batches: int
    replicas: int

    @property
    def layout(self) -> Layout:
        """Return the layout, the same for all micro-batches."""
        return self.shares[0].run.layout

    def memory(self, stage: int) -> StageMemory:
        """Return the peak of one rank of a stage while the most demanding budget is in flight everywhere."""
        chunks, distributed = self.config.distill.num_chunks, self.config.optim.use_distributed_optimizer
        shards = self.replicas * self.layout.context if distributed else 1
        plans = (stage_memory(share.run, stage, self.micro_batches, chunks, shards) for share in self.shares)
        return max(plans, key=lambda plan: plan.total)

    @cached_property
    def peak_bytes(self) -> int:
        """Return the peak of the fullest stage."""
        return max(self.memory(stage).total for stage in range(self.layout.pipeline))

    def changed(self, **changes: Any) -> "PhasePlan":
        """Return the same phase with other values of these fields in all its micro-batches."""
        return replace(self, shares=tuple(replace(one, run=replace(one.run, **changes)) for one in self.shares))

    def flops(self, stage: int, *, recompute: bool = True) -> Flops:
        """Return one rank's mean work on a micro-batch of the mix; without `recompute` not what is done again."""
        parts = (stage_flops(share.run, stage, recompute=recompute) * share.weight for share in self.shares)
        return sum(parts, Flops())

    def step_flops(self, *, recompute: bool) -> float:
        """Return the FLOPs of a step over all GPUs; the model's alone, or with what recompute does again."""
        total = sum(self.flops(stage, recompute=recompute).total for stage in range(self.layout.pipeline))
        return total * self.micro_batches * self.replicas * self.layout.tensor * self.layout.context

    def sent_bytes(self, stage: int) -> dict[tuple[str, str], float]:
        """Return what one rank sends for a mean micro-batch, by group and operation."""
        ranks = {"tp": self.layout.tensor, "cp": self.layout.context, "pp": self.layout.pipeline}
        sent: defaultdict[tuple[str, str], float] = defaultdict(float)
        for share in self.shares:
            for (group, operation), payload in micro_batch_traffic(share.run, stage).items():
                sent[group, operation] += share.weight * moved_bytes(operation, payload, ranks[group])
        return sent

    def sent_bytes_once(self, stage: int) -> dict[tuple[str, str], float]:
        """Return what one rank sends once a step, to those with the same weights."""
        once = step_traffic(self.shares[0].run, stage, self.config.optim.use_distributed_optimizer)
        return {key: moved_bytes(key[1], sent, self.replicas * self.layout.context) for key, sent in once.items()}

    @cached_property
    def time(self) -> StepTime:
        """Estimate one step from its slowest stage."""
        stages = [self._micro_batch_time(stage) for stage in range(self.layout.pipeline)]
        slowest = max(stages, key=lambda parts: sum(parts.values()))
        link = self.config.cluster.network_gb_per_s * 1e9 * self.config.plan.link_efficiency
        return StepTime(
            **{name: seconds * self.micro_batches for name, seconds in slowest.items()},
            data=sum(self.sent_bytes_once(0).values()) / link,
            # Teacher and student each fill and drain the pipeline once: together one micro-batch's whole work.
            bubble=sum(slowest.values()) * (self.layout.pipeline - 1),
        )

    def _micro_batch_time(self, stage: int) -> dict[str, float]:
        """Return the seconds of one mean micro-batch on one stage, by kind; a group that fits in a node uses its links.

        Megatron-Core places tensor ranks side by side, then context ranks; stages are farthest apart.
        """
        cluster, assumed, layout, flops = self.config.cluster, self.config.plan, self.layout, self.flops(stage)
        matmul, attention = flops.matmul / assumed.matmul_efficiency, flops.attention / assumed.attention_efficiency
        at_peak = matmul + attention + flops.scan / assumed.scan_efficiency
        moved = sum(share.weight * elementwise_bytes(share.run, stage) for share in self.shares)
        seconds = {
            "products": at_peak / (cluster.peak_tflops * 1e12),
            "elementwise": moved / (cluster.memory_gb_per_s * 1e9 * assumed.memory_efficiency),
            **dict.fromkeys(_GROUPS.values(), 0.0),
        }
        node, ranks = cluster.gpus_per_node, layout.tensor * layout.context
        near = {"tp": layout.tensor <= node, "cp": ranks <= node, "pp": False}
        for (group, _), sent in self.sent_bytes(stage).items():
            speed = cluster.node_gb_per_s if near[group] else cluster.network_gb_per_s
            seconds[_GROUPS[group]] += sent / (speed * 1e9 * assumed.link_efficiency)
        return seconds


def elementwise_bytes(run: MicroBatchWork, stage: int) -> float:
    """Return the bytes that norms, gates, activations and the loss move through GPU memory for one micro-batch."""
    passes = 2 * _PASSES + _BACKWARD_PASSES + (_PASSES if run.layout.recompute else 0)  # teacher's forward included
    total = sum(count * passes * saved_bytes(layer) for layer, count in run.distinct_layers(stage))
    if stage == run.layout.pipeline - 1:
        total += _LOSS_PASSES * run.tokens * run.local_vocab * FP32_BYTES
    return total


def budget_samples(config: PlanConfig, space: Space) -> dict[str, Sample]:
    """Return the sample subnet of every budget, the ones recipes/cost.py prints."""
    deployment = config.elastic.deployment
    return {budget.name: sample_subnet(space, budget, deployment) for budget in config.budgets()}


def phase_plans(
    config: PlanConfig, parallel: ParallelConfig, micro_batch: int, samples: dict[str, Sample]
) -> tuple[PhasePlan, ...]:
    """Put every phase of the curriculum on a layout; the layout must be legal."""
    layout, lanes = model_layout(parallel, config.trainer), config.elastic.space.lanes
    replicas, parent = config.cluster.num_gpus // parallel.model_size, config.model.shape()
    full, gated = Subnet.full(parent), frozenset(config.space().elastic_axes())
    plans = []
    for phase in config.curriculum:
        run = MicroBatchWork(
            parent, layout, micro_batch, phase.sequence_length, phase.execution, full, KernelSet.FUSED, lanes, gated
        )
        shares, count = tuple(_shares(phase, run, samples)), phase.global_batch // (micro_batch * replicas)
        plans.append(PhasePlan(config, phase, shares, count, replicas))
    return tuple(plans)


def _shares(phase: ElasticPhase, run: MicroBatchWork, samples: dict[str, Sample]) -> Iterator[Share]:
    if run.masked:  # full-size work whatever the budget
        yield Share("all", 1.0, run)
        return
    weights = phase.weights(list(samples))
    for name, weight in zip(samples, weights, strict=True):
        if weight > 0:
            yield Share(name, weight / sum(weights), replace(run, subnet=samples[name].subnet))
