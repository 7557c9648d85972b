"""Sections shared by the verbs: one frozen dataclass per section of a YAML file, with its legal ranges in the types.

A default is a value a small run can start with; whole runs state every field in conf/. Rules between fields are in
rules.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from elastic.router.draw import RouterSettings
from elastic.space import ranges
from elastic.space.axes import Axis
from elastic.space.cost import Budget, Deployment
from elastic.space.ranges import Range, Required
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, KeepAtLeast, Space

# How a checkpoint is looked at before it is trusted: all checksums, or all sizes and the checksums of small files.
Verification = Literal["full", "sizes"]
# How documents stand in sequences: whole ones that never see each other, or one behind the other, cut where one ends.
Packed = Literal["isolated", "concatenated"]
LongDocuments = Literal["cut", "leave_out"]  # what becomes of those longer than a sequence where they are isolated
OnEnd = Literal["repeat", "stop"]  # of a source that has been read once


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the parent, and how its weights start. Layers of one kind share a width."""

    pattern: Annotated[str, Required("for example M-M*-")] = "M-M*-"
    vocab: ranges.Vocab | None = None
    vocab_multiple: ranges.Vocab = 128
    hidden: ranges.Size = 128
    ffn: ranges.Size = 256
    mamba_heads: ranges.Heads = 8
    head_channels: ranges.Heads = 16
    mamba_groups: ranges.Heads = 2
    mamba_state: ranges.Heads = 16
    conv_kernel: ranges.Taps = 4
    attention_heads: ranges.Heads = 4
    kv_heads: ranges.Heads = 2
    attention_channels: ranges.Heads = 32
    tied_embeddings: bool = False
    norm_epsilon: ranges.Epsilon = 1e-5
    init_std: ranges.Scale = 0.02

    def padded_vocab(self, tokens: int) -> int:
        """Return the vocabulary size for a tokenizer of `tokens` entries: the next multiple of `vocab_multiple`."""
        return math.ceil(tokens / self.vocab_multiple) * self.vocab_multiple

    def shape(self, vocab: int | None = None) -> ModelShape:
        """Build the parent's shape, over `vocab` entries where the config leaves them null.

        Raises PatternError, ShapeError, or ValueError if neither names a vocabulary size.
        """
        size = self.vocab if self.vocab is not None else vocab
        if size is None:
            raise ValueError("model.vocab = null: fill it in from the prepared data first (config.with_vocab)")
        sizes = {name: value for name, value in asdict(self).items() if name not in ("vocab_multiple", "init_std")}
        return ModelShape.uniform(**sizes | {"vocab": size})


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """Choices per axis; null leaves the axis full. `lanes` deals the FFN neurons.

    `keep_at_least`: layers of a kind that every depth keeps, the best-ranked ones, where the parent has them. Without
    attention a submodel's cache has no length for stock transformers.
    """

    lanes: ranges.Size = 8
    keep_at_least: KeepAtLeast = field(default_factory=lambda: {"attention": 1})
    hidden: AxisChoices | None = None
    ffn: AxisChoices | None = None
    mamba_head: AxisChoices | None = None
    mamba_channel: AxisChoices | None = None
    attention_head: AxisChoices | None = None
    depth: AxisChoices | None = None

    def axes(self) -> dict[Axis, AxisChoices]:
        """Return the choices of every axis that is named."""
        return {axis: choices for axis in Axis if (choices := getattr(self, axis.value)) is not None}

    def space(self, parent: ModelShape, depth_ranking: tuple[int, ...] = ()) -> Space:
        """Build the space inside `parent`; raises SpaceError. An empty ranking keeps the first layers."""
        return Space(parent, self.axes(), self.lanes, depth_ranking, self.keep_at_least)


@dataclass(frozen=True, kw_only=True)
class ElasticSection:
    """What the family is: the space of subnets, the budgets asked for, and the routers that meet them."""

    space: SpaceConfig = field(default_factory=SpaceConfig)
    budgets: Annotated[tuple[Budget, ...], Range(low=1)] = (Budget(name="full", ratio=1.0),)
    deployment: Deployment = field(default_factory=Deployment)
    router: RouterSettings = field(default_factory=RouterSettings)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Weights of the loss; `chunk_tokens` have logits at a time; fp8: the teacher's projections multiply E4M3 codes.

    `teacher`: the frozen permuted parent; or trained, the whole model in the weights that are trained, which learns the
    text with `teacher_cross_entropy_weight` (docs/method.md 1.4, eq. 15).
    """

    kl_weight: ranges.Weight = 1.0
    cross_entropy_weight: ranges.Weight = 0.0
    temperature: ranges.Temperature = 1.0
    chunk_tokens: ranges.Tokens = 2048
    teacher: Literal["frozen", "trained"] = "frozen"
    teacher_cross_entropy_weight: ranges.Weight = 1.0
    teacher_precision: Literal["bf16", "fp8"] = "bf16"


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number, or a text that reads as one."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True, kw_only=True)
class BlendSource:
    """One source of a blend: a prepared folder, or what another tool wrote: Megatron's .bin and .idx, by their prefix
    or a folder of them. Then `tokenizer` is the folder of its tokenizer, and `validation` names its held-out pairs.

    `name` null is the last part of the path. `on_end` null does as data.on_end says.
    """

    path: Annotated[str, Required("a folder of recipes/prepare_data.py, or the prefix of a .bin/.idx pair")]
    weight: Annotated[float, Range(0, 1e18, open_low=True), Required("any number above 0, or leave the source out")]
    name: ranges.MemberName | None = None
    tokenizer: str | None = None
    validation: str | None = None
    on_end: OnEnd | None = None

    @staticmethod
    def spelled_out(given: Sequence[Any]) -> Sequence[Any]:
        """Return the sections that [weight, path, ...] stands for, or paths alone, whose weights are missing."""
        if all(isinstance(entry, str) and not _is_number(entry) for entry in given):
            return [dict(path=path) for path in given]
        if len(given) % 2 or any(isinstance(entry, Mapping) for entry in given):
            return given
        weights = [float(weight) if _is_number(weight) else weight for weight in given[::2]]
        return [dict(weight=weight, path=path) for weight, path in zip(weights, given[1::2], strict=True)]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What is read: `path`, one prepared folder, or `blend`, several sources by weight; how sequences are made of it.

    A blend may also be a list [weight, path, weight, path, ...], whose foreign pairs have the `tokenizer` named here.
    `on_end` stop refuses a run that would read a source more than once.
    `packing` null: chats isolated, that is whole documents that never see each other; texts concatenated. Of isolated
    ones, those longer than a sequence are cut, into documents of their own, or left out. `verify`: what is compared.
    """

    path: str = ""
    blend: tuple[BlendSource, ...] = ()
    tokenizer: str | None = None
    on_end: OnEnd = "repeat"
    packing: Packed | None = None
    long_documents: LongDocuments = "cut"
    verify: ranges.DataChecks = "sampled"

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sources of a blend, in the order they are listed."""
        return tuple(source.name or Path(source.path).name or source.path for source in self.blend)

    def weights(self, of_phase: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return the weights of the blend by name, or those a phase gives instead (a source left out: 0)."""
        own = dict(zip(self.names, (source.weight for source in self.blend), strict=True))
        return {name: of_phase.get(name, 0.0) for name in own} if of_phase else own


@dataclass(frozen=True, kw_only=True)
class DataConfig(PreparedData):
    """Prepared data, and how many sequences are taken at once and held out."""

    micro_batch: ranges.Sequences = 1
    validation_sequences: ranges.Sequences = 64


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam for the model and its own Adam for the router."""

    adam_beta1: ranges.Decay = 0.9
    adam_beta2: ranges.Decay = 0.98
    eps: ranges.Epsilon = 1e-8
    weight_decay: ranges.Rate = 0.0
    router_weight_decay: ranges.Rate = 0.0
    clip_grad: ranges.Weight = 1.0
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks per model replica, replicas take the rest; recompute nothing, what is between products, or whole layers."""

    tensor: ranges.Ranks = 1
    pipeline: ranges.Ranks = 1
    context: ranges.Ranks = 1
    sequence: bool = False
    recompute: ranges.Recompute = "none"

    @property
    def model_size(self) -> int:
        """Return the number of ranks that hold one replica."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How numbers are computed, for every verb. `num_threads` null leaves PyTorch's choice.

    `kernels`: on a GPU take what is installed, and PyTorch where a package is missing; or require all of them.
    `deterministic` is PyTorch's switch, of which other packages' kernels know nothing.
    `collective_timeout_s` is how long a rank waits for another before the run ends in an error.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    kernels: Literal["auto", "required"] = "auto"
    num_threads: ranges.Threads | None = None
    deterministic: bool = True
    collective_timeout_s: ranges.Seconds = 900.0


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(ComputeConfig):
    """Length and rhythm of a training run, in optimizer steps. `max_steps` null runs the whole curriculum.

    A step with a loss or gradient that is not finite is skipped; `max_skipped_in_a_row` of them end the run.
    `loss_spike_deviations` (null: never) is how far above its recent median, in robust standard deviations, a budget's
    loss is reported. `watchdog_timeout_s` is how long a rank may do one thing before it says where it stands and ends.
    """

    max_steps: ranges.Steps | None = None
    log_every_n_steps: ranges.Steps = 10
    val_check_interval: ranges.Steps = 100
    checkpoint_every_n_steps: ranges.Steps = 100
    max_skipped_in_a_row: ranges.Steps = 5
    loss_spike_deviations: ranges.Deviations | None = 8.0
    watchdog_timeout_s: ranges.Seconds = 600.0


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Checks that cost time. `sanity` compares every copy of weights, router and gates around every nth step."""

    sanity: bool = False
    sanity_every_n_steps: ranges.Steps = 1


@dataclass(frozen=True, kw_only=True)
class ExpManagerConfig:
    """Where a run writes: exp_dir/name/version. An existing folder is resumed or replaced only when told to."""

    exp_dir: ranges.Name = "runs"
    name: ranges.MemberName = "elastic"
    version: ranges.MemberName = "version_0"
    overwrite: bool = False

    @property
    def run_dir(self) -> str:
        """Return the folder of the run, relative to the working directory unless exp_dir is absolute."""
        return f"{self.exp_dir}/{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class TrainExpManagerConfig(ExpManagerConfig):
    """Adds what only a training run has: resuming, loggers, and how its checkpoints are written, checked and kept.

    `verify_on_resume` full compares every file of the checkpoint with its checksum, sizes only the small ones.
    `keep_milestones_every_n_steps` null keeps no more than the newest `keep_last_checkpoints`. `async_save` writes from
    a copy in the host's memory while training goes on.
    `accept_changes` names fields that may differ from those of the checkpoint a run goes on from (resume.py).
    """

    resume_if_exists: bool = True
    accept_changes: tuple[str, ...] = ()
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    verify_on_resume: Verification = "full"
    keep_last_checkpoints: ranges.Files = 2
    keep_milestones_every_n_steps: ranges.Steps | None = None
    async_save: bool = False
