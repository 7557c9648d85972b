"""One phase of a curriculum on one layout: the micro-batches it is made of, their memory, work and traffic."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from elastic.config.sections import ParallelConfig
from elastic.plan.config import PlanConfig
from elastic.plan.flops import Flops, stage_flops
from elastic.plan.memory import StageMemory, stage_memory
from elastic.plan.traffic import micro_batch_traffic, moved_bytes, step_traffic
from elastic.plan.work import KernelSet, MicroBatchWork
from elastic.router.phases import ElasticPhase
from elastic.run.world import model_layout
from elastic.space.reach import Sample, sample_subnet
from elastic.space.shape import Subnet
from elastic.space.space import Space
from elastic.world.groups import Layout


@dataclass(frozen=True)
class Share:
    """A part of a phase's micro-batches: those of one budget, all alike."""

    budget: str
    weight: float
    run: MicroBatchWork


@dataclass(frozen=True)
class PhasePlan:
    """One phase on one layout: its micro-batches by budget, and how many a replica runs in a step."""

    phase: ElasticPhase
    shares: tuple[Share, ...]
    micro_batches: int
    replicas: int
    num_chunks: int
    distributed_optimizer: bool = False

    @property
    def layout(self) -> Layout:
        """Return the layout, the same for all micro-batches."""
        return self.shares[0].run.layout

    def memory(self, stage: int) -> StageMemory:
        """Return the peak of one rank of a stage while the most demanding budget is in flight everywhere."""
        shards = self.replicas * self.layout.context if self.distributed_optimizer else 1
        plans = (stage_memory(share.run, stage, self.micro_batches, self.num_chunks, shards) for share in self.shares)
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
        once = step_traffic(self.shares[0].run, stage, self.distributed_optimizer)
        return {key: moved_bytes(key[1], sent, self.replicas * self.layout.context) for key, sent in once.items()}


def budget_samples(config: PlanConfig, space: Space) -> dict[str, Sample]:
    """Return the sample subnet of every budget, the ones recipes/cost.py prints."""
    deployment = config.elastic.deployment
    return {budget.name: sample_subnet(space, budget, deployment) for budget in config.budgets()}


def phase_plans(
    config: PlanConfig, parallel: ParallelConfig, micro_batch: int, samples: dict[str, Sample]
) -> tuple[PhasePlan, ...]:
    """Put every phase of the curriculum on a layout; the layout must be legal."""
    layout, lanes = model_layout(parallel, config.trainer), config.elastic.space.lanes
    replicas, parent = config.cluster.num_gpus // parallel.model_size, config.parent_shape()
    full, gated = Subnet.full(parent), frozenset(config.space().elastic_axes())
    plans = []
    for phase in config.curriculum:
        run = MicroBatchWork(
            parent, layout, micro_batch, phase.sequence_length, phase.execution, full, KernelSet.FUSED, lanes, gated
        )
        plan = PhasePlan(
            phase=phase,
            shares=tuple(_shares(phase, run, samples)),
            micro_batches=phase.global_batch // (micro_batch * replicas),
            replicas=replicas,
            num_chunks=config.distill.num_chunks,
            distributed_optimizer=config.optim.use_distributed_optimizer,
        )
        plans.append(plan)
    return tuple(plans)


def _shares(phase: ElasticPhase, run: MicroBatchWork, samples: dict[str, Sample]) -> Iterator[Share]:
    if run.masked:  # full-size work whatever the budget
        yield Share("all", 1.0, run)
        return
    weights = phase.weights(list(samples))
    for name, weight in zip(samples, weights, strict=True):
        if weight > 0:
            yield Share(name, weight / sum(weights), replace(run, subnet=samples[name].subnet))
