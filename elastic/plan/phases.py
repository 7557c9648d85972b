"""One phase of a curriculum on one layout: the micro-batches it is made of, their memory and their work."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from elastic.config.sections import ParallelConfig
from elastic.model.model import Layout
from elastic.plan.config import PlanConfig
from elastic.plan.flops import Flops, StageFlops, stage_flops
from elastic.plan.memory import StageMemory, stage_memory
from elastic.plan.work import KernelSet, MicroBatchWork
from elastic.router.phases import ElasticPhase
from elastic.space.gates import Execution
from elastic.space.reach import Sample, sample_subnet
from elastic.space.shape import Subnet
from elastic.space.space import Space
from elastic.world.groups import model_layout


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
    optimizer_shards: int = 1

    @property
    def layout(self) -> Layout:
        """Return the layout, the same for all micro-batches."""
        return self.shares[0].run.layout

    def memory(self, stage: int) -> StageMemory:
        """Return the peak of one rank of a stage while the most demanding budget is in flight everywhere."""
        plans = (
            stage_memory(share.run, stage, self.micro_batches, self.num_chunks, self.optimizer_shards)
            for share in self.shares
        )
        return max(plans, key=lambda plan: plan.total)

    @cached_property
    def peak_bytes(self) -> int:
        """Return the peak of the fullest stage."""
        return max(self.memory(stage).total for stage in range(self.layout.pipeline))

    def flops(self, stage: int) -> StageFlops:
        """Return one rank's mean work on a micro-batch of the mix."""
        parts = [(share.weight, stage_flops(share.run, stage)) for share in self.shares]

        def mean(name: str) -> Flops:
            return sum((getattr(part, name) * weight for weight, part in parts), Flops())

        return StageFlops(*(mean(name) for name in ("teacher", "forward", "recompute", "backward", "head")))

    def step_flops(self, *, recompute: bool) -> float:
        """Return the FLOPs of a step over all GPUs; the model's alone, or with what recompute does again."""
        total = 0.0
        for stage in range(self.layout.pipeline):
            flops = self.flops(stage)
            total += flops.total.total - (0.0 if recompute else flops.recompute.total)
        return total * self.micro_batches * self.replicas * self.layout.tensor * self.layout.context


def budget_samples(config: PlanConfig, space: Space) -> dict[str, Sample]:
    """Return the sample subnet of every budget, the ones recipes/cost.py prints."""
    deployment = config.elastic.deployment
    return {budget.name: sample_subnet(space, budget, deployment) for budget in config.budgets()}


def phase_plans(
    config: PlanConfig,
    parallel: ParallelConfig,
    micro_batch: int,
    samples: dict[str, Sample],
    kernels: KernelSet = KernelSet.FUSED,
) -> tuple[PhasePlan, ...]:
    """Put every phase of the curriculum on a layout; the layout must be legal."""
    layout = model_layout(parallel, config.trainer)
    replicas = config.cluster.num_gpus // parallel.model_size
    parent, gated = config.parent_shape(), frozenset(config.space().elastic_axes())
    plans = []
    for phase in config.curriculum:
        run = MicroBatchWork(
            parent=parent,
            layout=layout,
            batch=micro_batch,
            length_tokens=phase.sequence_length,
            execution=phase.execution,
            subnet=Subnet.full(parent),
            kernels=kernels,
            lanes=config.elastic.space.lanes,
            gated_axes=gated,
        )
        plan = PhasePlan(
            phase=phase,
            shares=tuple(_shares(phase, run, samples)),
            micro_batches=phase.global_batch // (micro_batch * replicas),
            replicas=replicas,
            num_chunks=config.distill.num_chunks,
            optimizer_shards=replicas * parallel.context if config.optim.use_distributed_optimizer else 1,
        )
        plans.append(plan)
    return tuple(plans)


def _shares(phase: ElasticPhase, full: MicroBatchWork, samples: dict[str, Sample]) -> Iterator[Share]:
    if phase.execution is Execution.MASK:  # full-size work whatever the budget
        yield Share("all", 1.0, full)
        return
    weights = phase.weights(list(samples))
    for name, weight in zip(samples, weights, strict=True):
        if weight > 0:
            yield Share(name, weight / sum(weights), replace(full, subnet=samples[name].subnet))
