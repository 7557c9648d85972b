"""The configs of the verbs that take models out of a checkpoint (evaluate, extract, generate) or bring one in."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from elastic.config.sections import DataConfig
from elastic.config.training import Checkpoint, CheckpointInput, ComputedConfig, RunConfig, VerbConfig
from elastic.space import ranges
from elastic.space.axes import AXES
from elastic.space.gates import Execution
from elastic.space.ranges import Range, Required
from elastic.space.shape import ModelShape, Subnet

Widths = Annotated[tuple[ranges.Size, ...], Range(low=1)]


@dataclass(frozen=True, kw_only=True)
class SubnetConfig:
    """A subnet given by hand. Null is full; one width serves all layers, several go layer by layer.

    `params` instead of widths asks for a subnet of so many parameters, between the budgets next to it.
    """

    name: ranges.MemberName
    params: ranges.Params | None = None
    hidden: ranges.Size | None = None
    ffn: Widths | None = None
    mamba_heads: Widths | None = None
    head_channels: ranges.Heads | None = None
    attention_heads: Widths | None = None
    kept_layers: Annotated[tuple[ranges.Layers, ...], Range(low=1)] | None = None

    def subnet(self, parent: ModelShape) -> Subnet:
        """Return the subnet inside `parent`; raises SubnetError if it does not fit."""
        widths: dict[str, Any] = {}
        for entry in AXES.values():
            full, chosen = getattr(parent, entry.size), getattr(self, entry.size)
            one_for_all = entry.own and chosen is not None and len(chosen) == 1
            widths[entry.size] = full if chosen is None else chosen * len(full) if one_for_all else chosen
        subnet = Subnet(kept_layers=self.kept_layers or tuple(range(len(parent.pattern))), **widths)
        subnet.shape(parent)
        return subnet


@dataclass(frozen=True, kw_only=True)
class ServedInput(CheckpointInput):
    """Weights to run, and whose router decides the budgets (null: the router saved beside the weights).

    Weights of the permuted parent with the router of a family show what cutting without training costs.
    """

    checkpoint: str | None = None
    router: str | None = None


@dataclass(frozen=True, kw_only=True)
class MembersInput(ServedInput):
    """The same, where nothing else can be run."""

    checkpoint: Checkpoint = ""


@dataclass(frozen=True, kw_only=True)
class MembersConfig(VerbConfig):
    """A verb that takes members (budgets, subnets by hand) out of a checkpoint: the model's sizes come with it.

    `budget_names` null takes all budgets, an empty list none. (`budgets` is a group of files, so Hydra would not let
    the command line set a list of that name.)
    """

    init_from: MembersInput = field(default_factory=MembersInput)
    budget_names: tuple[str, ...] | None = None
    subnets: tuple[SubnetConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MembersConfig, RunConfig):
    """recipes/evaluate.py: loss, perplexity and cost per budget (null: all) and per subnet given by hand."""

    data: DataConfig = field(default_factory=DataConfig)
    sequence_length: ranges.TrainedLength = 256
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
    shard_bytes: ranges.Bytes = 5_000_000_000
    check: Literal["auto", "logits", "values"] = "auto"
    max_logit_difference: ranges.Weight = 1e-4


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
    break and a tab; `prompt_file` holds one more, which is taken as it is. `tokenizer` null takes the folder's own,
    or that of the data the checkpoint was trained on. Thinking has a limit of its own beside max_new_tokens.
    Temperature 0 is greedy. Text is printed; `output` names a JSON file that gets it, too, with tokens and speeds.
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
    max_new_tokens: ranges.Length = 128
    temperature: ranges.TemperatureOrZero = 0.0
    top_k: ranges.Vocab | None = None
    top_p: ranges.Share | None = None
    output: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ImportConfig(VerbConfig):
    """recipes/import_hf.py: stock nemotron_h folder to Megatron-Core checkpoint, in one process."""

    source: Annotated[str, Required("a Hugging Face folder with config.json and safetensors files")] = ""
    # The vocabulary is filled up to a multiple of this, as tensor parallelism needs it; exports leave the rows out.
    vocab_multiple: ranges.Vocab = 1
