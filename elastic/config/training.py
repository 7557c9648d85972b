"""One config dataclass per verb that trains or scores, built from the shared sections; serving.py has the others.

A recipe turns its YAML into one of these (load.py), checks it (rules.py) and passes it on.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

from elastic.config import sections
from elastic.config.sections import DataConfig, DataFolder, Verification
from elastic.router.phases import ElasticPhase, Phase
from elastic.space.cost import Budget
from elastic.space.ranges import Range, Required, Seed, Size
from elastic.space.space import Space

Checkpoint = Annotated[str, Required("a run folder of an earlier verb, or one checkpoint in it")]


@dataclass(frozen=True, kw_only=True)
class VerbConfig:
    """What every verb that writes a run folder has."""

    exp_manager: sections.ExpManagerConfig = field(default_factory=sections.ExpManagerConfig)


@dataclass(frozen=True, kw_only=True)
class ComputedConfig:
    """What every verb that runs a model has, with or without a run folder."""

    seed: Seed = 1234
    trainer: sections.ComputeConfig = field(default_factory=sections.ComputeConfig)
    parallel: sections.ParallelConfig = field(default_factory=sections.ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(ComputedConfig, VerbConfig):
    """A verb that runs a model and writes a run folder."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What both training verbs have beyond that; the other verbs find the model's sizes beside its weights."""

    model: sections.ModelConfig = field(default_factory=sections.ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: sections.OptimConfig = field(default_factory=sections.OptimConfig)
    trainer: sections.TrainerConfig = field(default_factory=sections.TrainerConfig)
    exp_manager: sections.TrainExpManagerConfig = field(default_factory=sections.TrainExpManagerConfig)
    curriculum: Annotated[tuple[Phase, ...], Range(low=1)] = (Phase(name="pretrain", steps=100),)
    debug: sections.DebugConfig = field(default_factory=sections.DebugConfig)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """recipes/pretrain_parent.py: train a parent from scratch."""


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The prepared data whose training split the scores are collected on."""

    path: DataFolder = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointInput:
    """A checkpoint that is read, and how closely it is looked at first: all checksums, or sizes (and small files)."""

    verify: Verification = "full"


@dataclass(frozen=True, kw_only=True)
class ParentInput(CheckpointInput):
    """The parent to score."""

    parent: Checkpoint = ""


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig(RunConfig):
    """recipes/estimate_importance.py: scores, rankings, permuted parent. `lanes` deals its FFN neurons."""

    init_from: ParentInput = field(default_factory=ParentInput)
    data: CalibrationData = field(default_factory=CalibrationData)
    importance: sections.ImportanceSection = field(default_factory=sections.ImportanceSection)
    lanes: Size = 8


@dataclass(frozen=True, kw_only=True)
class PermutedParentInput(CheckpointInput):
    """The permuted parent: where the student starts, and the teacher. Its record carries lanes and depth ranking."""

    permuted_parent: Checkpoint = ""


@dataclass(frozen=True, kw_only=True)
class ElasticRunConfig(TrainConfig):
    """What describes a run of the main job, for the verbs that train it or price it."""

    elastic: sections.ElasticSection = field(default_factory=sections.ElasticSection)
    curriculum: Annotated[tuple[ElasticPhase, ...], Range(low=1)] = (ElasticPhase(name="train", steps=100),)
    distill: sections.DistillConfig = field(default_factory=sections.DistillConfig)

    def space(self, depth_ranking: tuple[int, ...] = ()) -> Space:
        """Build the space of subnets; raises SpaceError."""
        return self.elastic.space.space(self.model.shape(), depth_ranking)

    def budgets(self) -> tuple[Budget, ...]:
        """Return the budgets in absolute units, in the order of the config."""
        parent, deployment = self.model.shape(), self.elastic.deployment
        return tuple(budget.absolute(parent, deployment) for budget in self.elastic.budgets)


@dataclass(frozen=True, kw_only=True)
class ElasticConfig(ElasticRunConfig):
    """recipes/train_elastic.py: the main job."""

    init_from: PermutedParentInput = field(default_factory=PermutedParentInput)


@dataclass(frozen=True, kw_only=True)
class UnreadDataConfig(DataConfig):
    """The data section of a run that is only priced; a given folder says the vocabulary where model.vocab is null."""

    path: str = ""


@dataclass(frozen=True, kw_only=True)
class OptionalParentInput(CheckpointInput):
    """The permuted parent whose depth ranking says which layers leave (no weight is read); null: the last ones."""

    permuted_parent: str | None = None


@dataclass(frozen=True, kw_only=True)
class CostConfig(ElasticRunConfig):
    """recipes/cost.py: what a run of the main job can reach, from its own config; `output` null prints only."""

    data: UnreadDataConfig = field(default_factory=UnreadDataConfig)
    init_from: OptionalParentInput = field(default_factory=OptionalParentInput)
    output: str | None = None


def with_vocab[T: TrainConfig](config: T, tokenizer_tokens: int) -> T:
    """Return the config with a null model.vocab filled in from the tokenizer, padded to model.vocab_multiple."""
    if config.model.vocab is not None:
        return config
    return replace(config, model=replace(config.model, vocab=config.model.padded_vocab(tokenizer_tokens)))
