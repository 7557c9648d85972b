"""One config dataclass per verb, built from the shared sections.

A recipe turns its YAML into one of these (`config_load.load`), checks it (`config_rules.check`) and passes it on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from elastic.router.phases import Curriculum
from elastic.space.axes import Space
from elastic.space.budget import Budget
from elastic.space.cost import Deployment
from elastic.space.gates import Execution
from elastic.space.pattern import LayerKind
from elastic.space.shape import WIDTH_FIELD, ModelShape
from elastic.space.subnet import Subnet
from elastic.train.config_elastic import DistillConfig, ElasticPhaseConfig, ElasticSection, PhaseConfig
from elastic.train.config_sections import (
    ComputeConfig,
    DataConfig,
    DataFolder,
    DebugConfig,
    ExpManagerConfig,
    ImportanceSection,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainerConfig,
    TrainExpManagerConfig,
    Verification,
)
from elastic.train.config_types import Count, CountOrZero, Name, PositiveOrZero, Range, Required, Share

Checkpoint = Annotated[str, Required("a run folder of an earlier verb, or one checkpoint in it")]


@dataclass(frozen=True, kw_only=True)
class VerbConfig:
    """What every verb that writes a run folder has."""

    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(VerbConfig):
    """What every verb that runs a model has beyond that."""

    seed: CountOrZero = 1234
    trainer: ComputeConfig = field(default_factory=ComputeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What both training verbs have beyond that; the other verbs find the model's sizes beside its weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: TrainExpManagerConfig = field(default_factory=TrainExpManagerConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def parent_shape(self) -> ModelShape:
        """Return the parent's shape; raises ValueError while model.vocab is null."""
        return self.model.shape()


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """recipes/pretrain_parent.py: train a parent from scratch."""

    curriculum: Annotated[tuple[PhaseConfig, ...], Range(low=1)] = (PhaseConfig(name="pretrain", steps=100),)

    def curriculum_phases(self) -> Curriculum:
        """Return the phases in the form the loop takes."""
        return Curriculum(tuple(phase.phase() for phase in self.curriculum))


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
    importance: ImportanceSection = field(default_factory=ImportanceSection)
    lanes: Count = 8


@dataclass(frozen=True, kw_only=True)
class PermutedParentInput(CheckpointInput):
    """The permuted parent: where the student starts, and the teacher. Its record carries lanes and depth ranking."""

    permuted_parent: Checkpoint = ""


@dataclass(frozen=True, kw_only=True)
class ElasticRunConfig(TrainConfig):
    """What describes a run of the main job, for the verbs that train it or price it."""

    elastic: ElasticSection = field(default_factory=ElasticSection)
    curriculum: Annotated[tuple[ElasticPhaseConfig, ...], Range(low=1)] = (ElasticPhaseConfig(name="train", steps=100),)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def space(self, depth_ranking: tuple[int, ...] = ()) -> Space:
        """Build the space of subnets; raises SpaceError."""
        return self.elastic.space.space(self.parent_shape(), depth_ranking)

    def deployment(self) -> Deployment:
        """Return the conditions under which deployment bytes and FLOPs are counted."""
        return self.elastic.deployment.deployment()

    def curriculum_phases(self) -> Curriculum:
        """Return the phases in the form the loop takes, weights in the order of the budgets."""
        names = [budget.name for budget in self.elastic.budgets]
        return Curriculum(tuple(phase.elastic_phase(names) for phase in self.curriculum))

    def budgets(self) -> tuple[Budget, ...]:
        """Return the budgets in absolute units, in the order of the config."""
        parent, deployment = self.parent_shape(), self.deployment()
        return tuple(budget.budget(parent, deployment) for budget in self.elastic.budgets)


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


@dataclass(frozen=True, kw_only=True)
class SubnetConfig:
    """A subnet given by hand. An empty list or null is full; one width serves all layers, several go layer by layer."""

    name: Name
    hidden: Count | None = None
    ffn: tuple[Count, ...] = ()
    mamba_heads: tuple[Count, ...] = ()
    head_channels: Count | None = None
    attention_heads: tuple[Count, ...] = ()
    kept_layers: tuple[CountOrZero, ...] = ()

    def subnet(self, parent: ModelShape) -> Subnet:
        """Return the subnet inside `parent`; raises SubnetError if it does not fit."""
        given = {LayerKind.MLP: self.ffn, LayerKind.MAMBA: self.mamba_heads, LayerKind.ATTENTION: self.attention_heads}
        widths = {}
        for kind, name in WIDTH_FIELD.items():
            num_layers = len(parent.pattern.layers_of(kind))
            full = Subnet.full(parent)
            chosen = given[kind] or getattr(full, name)
            widths[name] = chosen * num_layers if len(chosen) == 1 else chosen
        subnet = Subnet(
            hidden=self.hidden or parent.hidden,
            head_channels=self.head_channels or parent.head_channels,
            kept_layers=self.kept_layers or tuple(range(len(parent.pattern))),
            **widths,
        )
        subnet.shape(parent)
        return subnet


@dataclass(frozen=True, kw_only=True)
class FamilyInput(CheckpointInput):
    """Weights to run, and whose router decides the budgets (null: the router saved beside the weights).

    Weights of the permuted parent with the router of a family show what cutting without training costs.
    """

    checkpoint: Checkpoint = ""
    router: str | None = None


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(VerbConfig):
    """A verb that takes budgets out of a checkpoint: the model's sizes come with it.

    `budget_names` null takes all budgets, an empty list none. (`budgets` is a group of files, so Hydra would not let
    the command line set a list of that name.)
    """

    init_from: FamilyInput = field(default_factory=FamilyInput)
    budget_names: tuple[str, ...] | None = None
    subnets: tuple[SubnetConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(FamilyConfig, RunConfig):
    """recipes/evaluate.py: loss, perplexity and cost per budget (null: all) and per subnet given by hand."""

    data: DataConfig = field(default_factory=DataConfig)
    sequence_length: Annotated[int, Range(low=2)] = 256
    execution: Execution = Execution.SLICE


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What extract writes, and how a finished folder is checked.

    `precision` null keeps the number format of the checkpoint. `check` auto compares logits where the subnet and the
    reloaded folder fit in memory, and every stored value with the parent's where they do not.
    """

    hugging_face: bool = True
    megatron: bool = False
    precision: Literal["fp32", "bf16"] | None = None
    shard_bytes: Count = 5_000_000_000
    check: Literal["auto", "logits", "values"] = "auto"
    max_logit_difference: PositiveOrZero = 1e-4


@dataclass(frozen=True, kw_only=True)
class TokenizerInput:
    """The prepared data whose tokenizer goes along; null takes the one the checkpoint was trained on."""

    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(FamilyConfig):
    """recipes/extract.py: budgets to Hugging Face folders and/or Megatron-Core checkpoints."""

    data: TokenizerInput = field(default_factory=TokenizerInput)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass(frozen=True, kw_only=True)
class ServedInput(CheckpointInput):
    """A nested checkpoint to answer from, and whose router decides its budgets (null: the router saved beside it)."""

    checkpoint: str | None = None
    router: str | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RunConfig):
    """recipes/generate.py: text from one budget, or thought with one and answered with another.

    The weights come from init_from.checkpoint or from `folder`, a Hugging Face folder. `budget`, `think` and `answer`
    name budgets or entries of `subnets`; without any, the whole model writes. `prompt_file` holds one prompt.
    `tokenizer` null takes the folder's own, or that of the data the checkpoint was trained on. Thinking has a limit of
    its own beside max_new_tokens. Temperature 0 is greedy.
    """

    init_from: ServedInput = field(default_factory=ServedInput)
    folder: str | None = None
    tokenizer: str | None = None
    budget: str | None = None
    subnets: tuple[SubnetConfig, ...] = ()
    think: str | None = None
    answer: str | None = None
    marker: Annotated[str, Required("the text that ends the thinking")] = "</think>"
    max_think_tokens: Count = 512
    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    max_new_tokens: Count = 128
    temperature: PositiveOrZero = 0.0
    top_k: Count | None = None
    top_p: Share | None = None


@dataclass(frozen=True, kw_only=True)
class ImportConfig(VerbConfig):
    """recipes/import_hf.py: stock nemotron_h folder to Megatron-Core checkpoint, in one process."""

    source: Annotated[str, Required("a Hugging Face folder with config.json and safetensors files")] = ""


def with_vocab[T: TrainConfig](config: T, tokenizer_tokens: int) -> T:
    """Return the config with a null model.vocab filled in from the tokenizer, padded to model.vocab_multiple."""
    if config.model.vocab is not None:
        return config
    return replace(config, model=replace(config.model, vocab=config.model.padded_vocab(tokenizer_tokens)))


def total_steps(curriculum: Sequence[PhaseConfig], max_steps: int | None) -> int:
    """Return the optimizer steps of a run: the whole curriculum, or fewer when trainer.max_steps says so."""
    whole = sum(phase.num_steps for phase in curriculum)
    return whole if max_steps is None else min(whole, max_steps)
