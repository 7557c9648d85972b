"""One config dataclass per verb, built from the shared sections: first those that train, score or price a run, then
those that take models out of a checkpoint (evaluate, extract, generate) or bring one in.

A recipe turns its YAML into one of these (load.py), checks it (rules.py) and passes it on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from elastic.config import sections
from elastic.config.export import ExportConfig
from elastic.config.inputs import (
    MembersInput,
    OptionalParentInput,
    ParentInput,
    PermutedParentInput,
    ServedInput,
    SubnetConfig,
)
from elastic.config.sections import DataConfig, PreparedData
from elastic.router.phases import ElasticPhase, Phase
from elastic.space import ranges
from elastic.space.cost import Budget
from elastic.space.gates import Execution
from elastic.space.latency import LatencyTable
from elastic.space.ranges import Range, Required
from elastic.space.space import Space


@dataclass(frozen=True, kw_only=True)
class VerbConfig:
    """What every verb that writes a run folder has."""

    exp_manager: sections.ExpManagerConfig = field(default_factory=sections.ExpManagerConfig)


@dataclass(frozen=True, kw_only=True)
class ComputedConfig:
    """What every verb that runs a model has, with or without a run folder."""

    seed: ranges.Seed = 1234
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

    def of(self, phase: Phase) -> Self:
        """Return the config with the layout and micro-batch of one of its phases in the place of the run's."""
        data = replace(self.data, micro_batch=phase.micro_batch or self.data.micro_batch)
        return replace(self, parallel=replace(self.parallel, **phase.own_layout), data=data)

    def layouts(self) -> dict[str, Self]:
        """Return the config once for each layout of its phases, by what stands before the layout's fields there."""
        found: dict[str, Self] = {}
        for index, phase in enumerate(self.curriculum):
            if (one := self.of(phase)) not in found.values():
                found["" if one == self else f"curriculum.{index}."] = one
        return found


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """recipes/pretrain_parent.py: train a parent from scratch."""


@dataclass(frozen=True, kw_only=True)
class ImportanceSection:
    """How widths are scored, layers on `depth_sequences`, and the size of the calibration (docs/method.md 1.1)."""

    method: Literal["activations", "magnitude", "random"] = "magnitude"
    num_sequences: ranges.Sequences = 64
    sequence_length: ranges.TrainedLength = 256
    micro_batch: ranges.Sequences = 4
    depth: Literal["iterative", "one_shot", "cosine", "last_first", "none"] = "iterative"
    depth_sequences: ranges.Sequences = 16
    max_removed_layers: Annotated[int, Range(1, ranges.MOST_LAYERS)] | None = None


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig(RunConfig):
    """recipes/estimate_importance.py: scores on training data, rankings, permuted parent; `lanes` deals FFN neurons."""

    init_from: ParentInput = field(default_factory=ParentInput)
    data: PreparedData = field(default_factory=PreparedData)
    importance: ImportanceSection = field(default_factory=ImportanceSection)
    lanes: ranges.Size = 8


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
class CostConfig(ElasticRunConfig):
    """recipes/cost.py: what a run of the main job can reach, from its own config; `output` null prints only.

    Data need not be given: they only say the vocabulary where model.vocab is null.
    """

    init_from: OptionalParentInput = field(default_factory=OptionalParentInput)
    output: str | None = None


@dataclass(frozen=True, kw_only=True)
class MembersConfig(VerbConfig):
    """A verb that takes members (budgets, subnets by hand) out of a checkpoint: the model's sizes come with it.

    `budget_names` null takes all budgets, an empty list none. (`budgets` is a group of files, so Hydra would not let
    the command line set a list of that name.) `subnets` may also be a file that recipes/search.py wrote.
    """

    init_from: MembersInput = field(default_factory=MembersInput)
    budget_names: tuple[str, ...] | None = None
    subnets: tuple[SubnetConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(MembersConfig, RunConfig):
    """A verb that runs members on held-out data."""

    data: DataConfig = field(default_factory=DataConfig)
    sequence_length: ranges.TrainedLength = 256


@dataclass(frozen=True, kw_only=True)
class SearchConfig(HeldOutConfig):
    """recipes/search.py: sizes between and around the trained budgets; subnets given by hand are scored beside them.

    `constraint` has limits on any metrics, params<=7e9,flops_per_token>=1e9; null: none. `latency` names a table of
    recipes/measure_latency.py for limits on time; null: the family's, if it was trained with one. `score` names a
    function of yours, package.module.function, that takes the place of the held-out loss (docs/search.md).
    """

    constraint: str | None = None
    num_priced: ranges.Proposals = 2000
    num_scored: ranges.Proposals = 20
    latency: LatencyTable | None = None
    score: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluatedData(DataConfig):
    """Prepared data, and which of what they hold out is read: what training looks at now and then, or what it never
    does. `validation_sequences` counts those of either.
    """

    split: Literal["validation", "test"] = "validation"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(HeldOutConfig):
    """recipes/evaluate.py: loss, perplexity and cost per budget (null: all) and per subnet given by hand.

    Several `position_buckets` say the loss of so many equal parts of the sequence, too, from the front.
    """

    data: EvaluatedData = field(default_factory=EvaluatedData)
    position_buckets: Annotated[int, Range(1, 64)] = 1
    execution: Execution = Execution.SLICE
    teacher_precision: Literal["bf16", "fp8"] = "bf16"  # fp8: the whole parent, as the teacher that distill makes of it


@dataclass(frozen=True, kw_only=True)
class TokenizerInput:
    """The prepared data whose tokenizer goes along; null takes the one the checkpoint was trained on."""

    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(MembersConfig):
    """recipes/extract.py: budgets to Hugging Face folders and/or Megatron-Core checkpoints."""

    data: TokenizerInput = field(default_factory=TokenizerInput)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ComputedConfig):
    """recipes/generate.py: text from one budget, or thought with one and answered with another.

    The weights come from init_from.checkpoint or from `folder`, a Hugging Face folder. `budget`, `think` and `answer`
    name budgets or entries of `subnets`; without any, the whole model writes. In `prompts`, \\n and \\t are a line
    break and a tab; `prompt_file` holds one more, which is taken as it is. `chat_file` is a .jsonl of conversations to
    answer, put into the tokenizer's chat template. `tokenizer` null takes the folder's own, or that of the data the
    checkpoint was trained on. Thinking has a limit of its own beside max_new_tokens.
    Temperature 0 is greedy. `batch_size` texts of like lengths are written at once, each as if alone, and printed when
    all are there (1: as they come). `output` names a JSON file that gets them, too, with tokens and speeds.
    """

    init_from: ServedInput = field(default_factory=ServedInput)
    folder: str | None = None
    tokenizer: str | None = None
    budget: str | None = None
    subnets: tuple[SubnetConfig, ...] = ()
    think: str | None = None
    answer: str | None = None
    marker: Annotated[str, Required("the text that ends the thinking")] = "</think>"
    max_think_tokens: ranges.Length = 512
    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    chat_file: str | None = None
    max_new_tokens: ranges.Length = 128
    temperature: ranges.TemperatureOrZero = 0.0
    top_k: ranges.Vocab | None = None
    top_p: ranges.Share | None = None
    batch_size: ranges.Size = 8
    output: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ImportConfig(VerbConfig):
    """recipes/import_hf.py: stock nemotron_h folder to Megatron-Core checkpoint, in one process."""

    source: Annotated[str, Required("a Hugging Face folder with config.json and safetensors files")] = ""
    # Section `elastic` of the run that may follow, as far as it is given: shares become choices for this parent.
    elastic: Mapping[str, Any] = field(default_factory=dict)
    # The vocabulary is filled up to a multiple of this, as tensor parallelism needs it; exports leave the rows out.
    vocab_multiple: ranges.Vocab = 1


def with_vocab[T: TrainConfig](config: T, tokenizer_tokens: int) -> T:
    """Return the config with a null model.vocab filled in from the tokenizer, padded to model.vocab_multiple."""
    if config.model.vocab is not None:
        return config
    return replace(config, model=replace(config.model, vocab=config.model.padded_vocab(tokenizer_tokens)))
