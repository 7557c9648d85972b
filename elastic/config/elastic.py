"""Sections of the family: space, budgets, router, curriculum phases and distillation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from elastic.config.types import (
    Count,
    CountOrZero,
    MemberName,
    Name,
    Positive,
    PositiveOrZero,
    Range,
    Required,
    Share,
)
from elastic.router.draw import Mode
from elastic.router.phases import Phase
from elastic.router.schedules import LearningRate, Linear
from elastic.space.axes import Axis, AxisChoices, Space
from elastic.space.budget import Budget
from elastic.space.cost import Deployment, Metric
from elastic.space.gates import Execution
from elastic.space.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class AxisConfig:
    """Choices of one axis, descending, the full width first. `per_layer`: one choice for each layer of its kind."""

    choices: Annotated[tuple[Count, ...], Required("the full width first, then smaller ones")] = ()
    per_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """Choices per axis; null leaves the axis full. `lanes` deals the FFN neurons."""

    lanes: Count = 8
    hidden: AxisConfig | None = None
    ffn: AxisConfig | None = None
    mamba_head: AxisConfig | None = None
    mamba_channel: AxisConfig | None = None
    attention_head: AxisConfig | None = None
    depth: AxisConfig | None = None

    def axes(self) -> dict[Axis, AxisChoices]:
        """Return the choices of every axis that is named."""
        named = {
            Axis.HIDDEN: self.hidden,
            Axis.FFN: self.ffn,
            Axis.MAMBA_HEAD: self.mamba_head,
            Axis.MAMBA_CHANNEL: self.mamba_channel,
            Axis.ATTENTION_HEAD: self.attention_head,
            Axis.DEPTH: self.depth,
        }
        return {axis: AxisChoices(axis_.choices, axis_.per_layer) for axis, axis_ in named.items() if axis_ is not None}

    def space(self, parent: ModelShape, depth_ranking: tuple[int, ...] = ()) -> Space:
        """Build the space inside `parent`; raises SpaceError. An empty ranking keeps the first layers."""
        return Space(parent=parent, axes=self.axes(), lanes=self.lanes, depth_ranking=depth_ranking)


@dataclass(frozen=True, kw_only=True)
class DeploymentConfig:
    """Conditions a deployment budget is counted under: sequences at once, their length, bytes per element."""

    batch: Count = 1
    length_tokens: Count = 8192
    weight_bytes: Positive = 2.0
    kv_bytes: Positive = 2.0
    ssm_bytes: Positive = 4.0
    conv_bytes: Positive = 2.0

    def deployment(self) -> Deployment:
        """Return the conditions in the form the cost table takes."""
        return Deployment(
            batch=self.batch,
            length_tokens=self.length_tokens,
            weight_bytes=self.weight_bytes,
            kv_bytes=self.kv_bytes,
            ssm_bytes=self.ssm_bytes,
            conv_bytes=self.conv_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """A named limit on one metric: `target` in absolute units, or `ratio` of the parent's cost. Exactly one."""

    name: MemberName
    metric: Metric = Metric.PARAMS
    target: Positive | None = None
    ratio: Share | None = None

    def budget(self, parent: ModelShape, deployment: Deployment) -> Budget:
        """Return the budget in absolute units of its metric."""
        if self.target is not None:
            return Budget(self.name, self.metric, self.target)
        assert self.ratio is not None, "config_rules lets exactly one of target and ratio through"
        return Budget.from_ratio(self.name, self.metric, self.ratio, parent, deployment)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Form of the routers, one per axis, and the weights of their own losses (docs/method.md 1.3; the entropy is ours).

    A step's budgets are drawn `draws_per_step` times (null: as often as a replica has micro-batches), the noise of its
    gates `noise_draws_per_step` times (null: for every micro-batch). Both given, the same samples get the same gates
    at every data-parallel and micro-batch size.
    """

    hidden_width: Count = 256
    mode: Mode = Mode.SOFT
    budget_loss_weight: PositiveOrZero = 1.0
    entropy_weight: PositiveOrZero = 0.1
    draws_per_step: Count | None = None
    noise_draws_per_step: Count | None = None


def _full_budget() -> tuple[BudgetConfig, ...]:
    return (BudgetConfig(name="full", ratio=1.0),)


@dataclass(frozen=True, kw_only=True)
class ElasticSection:
    """What the family is: the space of subnets, the budgets asked for, and the routers that meet them."""

    space: SpaceConfig = field(default_factory=SpaceConfig)
    budgets: Annotated[tuple[BudgetConfig, ...], Range(low=1)] = field(default_factory=_full_budget)
    deployment: DeploymentConfig = field(default_factory=DeploymentConfig)
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Learning rate of one optimizer over one phase: linear warm-up to `peak`, then constant or cosine to `min`."""

    peak: PositiveOrZero = 1e-3
    min: PositiveOrZero = 0.0
    warmup_steps: CountOrZero = 0
    schedule: Literal["constant", "cosine"] = "constant"

    def learning_rate(self) -> LearningRate:
        """Return the schedule in the form the loop takes."""
        return LearningRate(self.peak, self.min, self.warmup_steps, cosine=self.schedule == "cosine")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One curriculum phase of any training. `global_batch` counts sequences; give `steps` or `tokens`, not both."""

    name: Name
    sequence_length: Annotated[int, Range(low=2)] = 256
    global_batch: Count = 8
    steps: Count | None = None
    tokens: Count | None = None
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the phase; a token count is rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None, "config_rules lets exactly one of steps and tokens through"
        return math.ceil(self.tokens / (self.sequence_length * self.global_batch))

    def phase(self) -> Phase:
        """Return the phase of a run without budgets."""
        return Phase(
            name=self.name,
            sequence_length=self.sequence_length,
            global_batch=self.global_batch,
            num_steps=self.num_steps,
            learning_rate=self.lr.learning_rate(),
        )


@dataclass(frozen=True, kw_only=True)
class ElasticPhaseConfig(PhaseConfig):
    """One phase of the main job. `budget_weights` by budget name (empty: uniform; a budget left out: never drawn).

    `temperature` and `logit_scale` run linearly from the first to the second value over the phase.
    """

    budget_weights: Mapping[str, PositiveOrZero] = field(default_factory=dict)
    router_lr: LearningRateConfig = field(default_factory=lambda: LearningRateConfig(peak=1e-2))
    temperature: tuple[Positive, Positive] = (1.0, 0.05)
    logit_scale: tuple[Positive, Positive] = (1.0, 10.0)
    router_frozen: bool = False
    execution: Execution = Execution.MASK

    def elastic_phase(self, budget_names: Sequence[str]) -> Phase:
        """Return the phase with its weights in the order of the budgets."""
        weights = self.budget_weights or dict.fromkeys(budget_names, 1.0)
        return replace(
            self.phase(),
            budget_weights=tuple(weights.get(name, 0.0) for name in budget_names),
            router_learning_rate=self.router_lr.learning_rate(),
            temperature=Linear(*self.temperature),
            logit_scale=Linear(*self.logit_scale),
            router_frozen=self.router_frozen,
            execution=self.execution,
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Weights of the distillation loss; `num_chunks` splits the tokens of a micro-batch so logits stay small."""

    kl_weight: PositiveOrZero = 1.0
    cross_entropy_weight: PositiveOrZero = 0.0
    temperature: Positive = 1.0
    num_chunks: Count = 1
