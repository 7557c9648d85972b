"""From the curriculum section of a config to the phases the loop runs."""

from collections.abc import Sequence

from elastic.router.phases import Curriculum, Phase
from elastic.router.schedules import LearningRate, Linear
from elastic.space.budget import Budget
from elastic.space.gates import Execution
from elastic.train.config_elastic import ElasticPhaseConfig, LearningRateConfig, PhaseConfig


def build_curriculum(phases: Sequence[PhaseConfig], budgets: Sequence[Budget] = ()) -> Curriculum:
    """Build the curriculum; budgets named in no `budget_weights` of a phase are not drawn in it."""
    return Curriculum(tuple(_phase(phase, budgets) for phase in phases))


def _phase(phase: PhaseConfig, budgets: Sequence[Budget]) -> Phase:
    common = dict(
        name=phase.name,
        sequence_length=phase.sequence_length,
        global_batch=phase.global_batch,
        num_steps=phase.num_steps,
        learning_rate=_learning_rate(phase.lr),
    )
    if not isinstance(phase, ElasticPhaseConfig):
        return Phase(**common)  # type: ignore[arg-type]
    weights = phase.budget_weights or dict.fromkeys((budget.name for budget in budgets), 1.0)
    return Phase(
        **common,  # type: ignore[arg-type]
        budget_weights=tuple(weights.get(budget.name, 0.0) for budget in budgets),
        router_learning_rate=_learning_rate(phase.router_lr),
        temperature=Linear(*phase.temperature),
        logit_scale=Linear(*phase.logit_scale),
        router_frozen=phase.router_frozen,
        execution=Execution(phase.execution),
    )


def _learning_rate(section: LearningRateConfig) -> LearningRate:
    return LearningRate(section.peak, section.min, section.warmup_steps, section.schedule == "cosine")
