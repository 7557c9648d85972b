"""One phase of a curriculum on one layout: the micro-batches it is made of, their memory, work, traffic and time."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from elastic.config.sections import ParallelConfig
from elastic.plan.config import PlanConfig
from elastic.plan.flops import Flops, model_flops, pass_flops
from elastic.plan.memory import StageMemory, rank_parameters, stage_memory
from elastic.plan.timing import Seconds, StepTime, micro_batch_seconds, once_seconds, schedule_seconds
from elastic.plan.traffic import micro_batch_traffic, moved_bytes, step_traffic
from elastic.plan.work import KernelSet, MicroBatchWork
from elastic.router.phases import ElasticPhase
from elastic.router.sampler import budget_of, draw_budgets
from elastic.run.world import model_layout
from elastic.space.reach import Sample, sample_subnet
from elastic.space.shape import Subnet
from elastic.space.space import Space
from elastic.world.groups import Layout

_IN_FP8 = tuple(f"{name}.weight" for name in ("in_proj", "out_proj", "qkv", "linear_proj", "fc1", "fc2"))
_STEPS = 4  # whose budgets are drawn, to see how much stages wait for each other


@dataclass(frozen=True)
class Share:
    """A part of a phase's micro-batches: those of one budget, all alike."""

    budget: str
    weight: float
    run: MicroBatchWork


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
        chunk, distributed = self.config.distill.chunk_tokens, self.config.optim.use_distributed_optimizer
        shards = self.replicas * self.layout.context if distributed else 1
        plans = (stage_memory(share.run, stage, self.micro_batches, chunk, shards) for share in self.shares)
        most = max(plans, key=lambda plan: plan.total)
        if self.config.distill.teacher_precision == "bf16":
            return most
        # A byte for each element that model/quantised.py takes; the scales, one a row, left out.
        elements = rank_parameters(self.shares[0].run.parent, self.layout.tensor, self.layout.pipeline, stage)
        taken = sum(size for name, size in elements.items() if name.endswith(_IN_FP8))
        return replace(most, teacher=most.teacher - taken * (self.layout.dtype.itemsize - 1))

    @cached_property
    def peak_bytes(self) -> int:
        """Return the peak of the fullest stage."""
        return max(self.memory(stage).total for stage in range(self.layout.pipeline))

    def changed(self, **changes: Any) -> "PhasePlan":
        """Return the same phase with other values of these fields in all its micro-batches."""
        return replace(self, shares=tuple(replace(one, run=replace(one.run, **changes)) for one in self.shares))

    def flops(self, stage: int, *, recompute: bool = True) -> Flops:
        """Return one rank's mean work on a micro-batch of the mix; without `recompute` not what is done again."""
        found = Flops()
        for share in self.shares:
            passes = pass_flops(share.run, stage)
            found += (
                sum((one for name, one in passes.items() if recompute or name != "recompute"), Flops()) * share.weight
            )
        return found

    def step_flops(self, *, recompute: bool) -> float:
        """Return the FLOPs of a step over all GPUs; the model's alone, or with what recompute does again."""
        total = sum(self.flops(stage, recompute=recompute).total for stage in range(self.layout.pipeline))
        return total * self.micro_batches * self.replicas * self.layout.tensor * self.layout.context

    def model_flops(self, *, with_teacher: bool) -> float:
        """Return what MFU counts of a step: the student's 6 N T + attention, or the teacher's third of its own too."""
        of_step = sum(share.weight * model_flops(share.run) for share in self.shares)
        of_step += model_flops(self.shares[0].run.teacher) / 3 if with_teacher else 0.0
        return of_step * self.micro_batches * self.replicas

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
        """Estimate one step: what its busiest stage does for a mean micro-batch, and waits for the others."""
        stages = range(self.layout.pipeline)
        seconds = {
            share.budget: [micro_batch_seconds(self.config, share.run, stage) for stage in stages]
            for share in self.shares
        }
        means = [defaultdict[tuple[str, str], float](float) for _ in stages]
        for share in self.shares:
            for mean, found in zip(means, seconds[share.budget], strict=True):
                for part, amount in found.items():
                    mean[part] += share.weight * amount
        busiest = max(stages, key=lambda stage: sum(means[stage].values()))
        parts = {part: self.micro_batches * amount for part, amount in means[busiest].items()}
        backward = sum(amount for (name, _), amount in means[busiest].items() if name in ("backward", "recompute"))
        if max(self.shares, key=lambda share: model_flops(share.run)).weight * self.micro_batches < 1:
            backward = 0.0  # replicas' last micro-batches differ, and the run reduces after them
        teacher = sum(amount for (name, _), amount in parts.items() if name == "teacher")
        run = self.shares[0].run
        parts |= once_seconds(self.config, run, busiest, self.replicas, backward, teacher)
        return StepTime(parts | {("once", "waiting"): self._waiting(seconds, busiest)})

    def _waiting(self, seconds: Mapping[str, Sequence[Seconds]], busiest: int) -> float:
        """Return how long the busiest stage waits in a step: filling and draining for the teacher and the student,
        and for other budgets on other stages, in the order in which the run takes them."""
        if self.layout.pipeline == 1:
            return 0.0

        def taken(budget: str, *passes: str) -> list[float]:
            return [sum(v for (name, _), v in stage.items() if name in passes) for stage in seconds[budget]]

        teacher = taken(self.shares[0].budget, "teacher")
        waiting = sum(teacher) - max(teacher) + self.micro_batches * (max(teacher) - teacher[busiest])
        student = {
            name: list(zip(taken(name, "forward", "loss"), taken(name, "recompute", "backward"), strict=True))
            for name in seconds
        }
        orders = list(self._orders())
        for order in orders:
            work = [student[name] for name in order]
            waiting += (schedule_seconds(work) - sum(sum(one[busiest]) for one in work)) / len(orders)
        return waiting

    def _orders(self) -> Iterator[list[str]]:
        """Yield the budgets of one replica's micro-batches over a few steps, in the order it runs them (Chooser): from
        the smallest to the largest."""
        shares = sorted(self.shares, key=lambda share: model_flops(share.run))
        draws = self.config.elastic.router.draws_per_step or self.micro_batches
        in_step = self.micro_batches * self.replicas
        for step in range(1 if len(shares) == 1 else _STEPS):
            drawn = draw_budgets([share.weight for share in shares], self.config.seed, step, draws)
            in_order = sorted(budget_of(drawn, number, in_step) for number in range(in_step))
            yield [shares[index].budget for index in in_order[:: self.replicas]]


def budget_samples(config: PlanConfig, space: Space) -> dict[str, Sample]:
    """Return the sample subnet of every budget, the ones recipes/cost.py prints."""
    deployment = config.elastic.deployment
    return {budget.name: sample_subnet(space, budget, deployment) for budget in config.budgets()}


def phase_plans(
    config: PlanConfig, parallel: ParallelConfig, micro_batch: int, samples: dict[str, Sample]
) -> tuple[PhasePlan, ...]:
    """Put every phase of the curriculum on one layout; the layout must be legal."""
    return tuple(_phase_plan(config, phase, parallel, micro_batch, samples) for phase in config.curriculum)


def own_plans(config: PlanConfig, samples: dict[str, Sample]) -> tuple[PhasePlan, ...]:
    """Put every phase of the curriculum on the layout that the config gives it."""
    views = ((phase, config.of(phase)) for phase in config.curriculum)
    return tuple(_phase_plan(config, phase, one.parallel, one.data.micro_batch, samples) for phase, one in views)


def _phase_plan(
    config: PlanConfig, phase: ElasticPhase, parallel: ParallelConfig, micro_batch: int, samples: dict[str, Sample]
) -> PhasePlan:
    layout, lanes = model_layout(parallel, config.trainer), config.elastic.space.lanes
    replicas, parent = config.cluster.num_gpus // parallel.model_size, config.model.shape()
    full, gated = Subnet.full(parent), frozenset(config.space().elastic_axes())
    run = MicroBatchWork(
        parent, layout, micro_batch, phase.sequence_length, phase.execution, full, KernelSet.FUSED, lanes, gated
    )
    shares, count = tuple(_shares(phase, run, samples)), phase.global_batch // (micro_batch * replicas)
    return PhasePlan(config, phase, shares, count, replicas)


def _shares(phase: ElasticPhase, run: MicroBatchWork, samples: dict[str, Sample]) -> Iterator[Share]:
    if run.masked:  # full-size work whatever the budget
        yield Share("all", 1.0, run)
        return
    weights = phase.weights(list(samples))
    for name, weight in zip(samples, weights, strict=True):
        if weight > 0:
            yield Share(name, weight / sum(weights), replace(run, subnet=samples[name].subnet))
