"""Rules of the model's sizes, the parallel layout and the batches; each yields one Problem per mistake."""

import difflib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass

from elastic.config.load import Problem, field_paths
from elastic.config.sections import ParallelConfig
from elastic.config.serving import EvaluateConfig
from elastic.config.training import (
    ComputedConfig,
    CostConfig,
    ElasticConfig,
    ImportanceConfig,
    PretrainConfig,
    TrainConfig,
    VerbConfig,
)
from elastic.space.axes import LayerKind
from elastic.space.ranges import MOST_LAYERS
from elastic.space.shape import LayerPattern, ModelShape, PatternError
from elastic.world.files import first_few


@dataclass(frozen=True)
class Cluster:
    """What the run was started on: processes in all, and whether they have GPUs."""

    num_processes: int = 1
    has_gpu: bool = False


def nearest_multiple(value: int, multiple: int) -> int:
    """Return the multiple closest to `value`, at least one `multiple`."""
    return max(1, round(value / multiple)) * multiple


def nearest_divisor(value: int, number: int) -> int:
    """Return the divisor of `number` closest to `value`, the smaller of two equally close ones."""
    divisors = (d for k in range(1, math.isqrt(number) + 1) if number % k == 0 for d in (k, number // k))
    return min(divisors, key=lambda divisor: (abs(divisor - value), divisor))


def multiple_problem(path: str, value: int, multiple: int, of_what: str) -> Iterator[Problem]:
    """Yield a problem unless `value` is a multiple of `multiple`, which `of_what` explains."""
    if value % multiple:
        remedy = f"nearest legal value is {nearest_multiple(value, multiple)}"
        yield Problem(path, value, f"must be a multiple of {of_what} = {multiple}", remedy)


def data_parallel(parallel: ParallelConfig, cluster: Cluster) -> int:
    """Return the number of replicas; 1 while the layout does not fit the processes, which check_world reports."""
    return 1 if cluster.num_processes % parallel.model_size else cluster.num_processes // parallel.model_size


def check_pattern(config: TrainConfig, cluster: Cluster) -> Iterator[Problem]:
    """The layer pattern must parse, by the one parser."""
    try:
        layers = len(LayerPattern.parse(config.model.pattern))
    except PatternError as error:
        yield Problem("model.pattern", config.model.pattern, str(error).rstrip("."), "write a pattern like M-M*-")
        return
    if layers > MOST_LAYERS:
        rule = f"must have at most {MOST_LAYERS} layers, it has {layers}"
        yield Problem("model.pattern", config.model.pattern, rule, "leave some out")


def check_sizes(config: TrainConfig, cluster: Cluster) -> Iterator[Problem]:
    """Heads must fill whole groups."""
    model = config.model
    yield from multiple_problem("model.mamba_heads", model.mamba_heads, model.mamba_groups, "model.mamba_groups")
    yield from multiple_problem("model.attention_heads", model.attention_heads, model.kv_heads, "model.kv_heads")


def check_world(config: ComputedConfig, cluster: Cluster) -> Iterator[Problem]:
    """Replicas must fill the processes, and sequence parallelism needs tensor parallelism."""
    if isinstance(config, CostConfig):
        return  # the layout is that of the run it prices
    parallel, world = config.parallel, cluster.num_processes
    if world % parallel.model_size:
        yield Problem(
            "parallel.tensor x pipeline x context",
            parallel.model_size,
            f"must divide the number of processes = {world}",
            f"nearest legal value is {nearest_divisor(parallel.model_size, world)}, or start "
            f"{math.ceil(world / parallel.model_size) * parallel.model_size} processes",
        )
    if parallel.sequence and parallel.tensor == 1:
        rule = "splits the sequence over tensor-parallel ranks and needs parallel.tensor > 1"
        yield Problem("parallel.sequence", True, rule, "nearest legal value is false")


def check_one_process(config: VerbConfig, cluster: Cluster) -> Iterator[Problem]:
    """A verb that streams from disk to disk has nothing to share out."""
    if cluster.num_processes > 1:
        rule = "this verb streams through one process, whatever the layout of the checkpoint"
        yield Problem(
            "number of processes", cluster.num_processes, rule, "nearest legal value is 1: leave torchrun out"
        )


def check_layout(config: TrainConfig, cluster: Cluster) -> Iterator[Problem]:
    """The model must split over the ranks of a replica; a nested one by lanes, any other FFN anywhere."""
    model = config.model
    lanes = config.elastic.space.lanes if isinstance(config, ElasticConfig) else None
    vocab_field = "model.vocab" if model.vocab is not None else "model.vocab_multiple"
    shape = model.shape(model.vocab_multiple)
    yield from layout_problems(shape, config.parallel, lanes, vocab_field)


def layout_problems(
    shape: ModelShape, parallel: ParallelConfig, lanes: int | None, vocab_field: str = "model.vocab"
) -> Iterator[Problem]:
    """Yield what keeps a model of `shape` from splitting over tensor, pipeline and context ranks."""
    yield from _tensor_problems(shape, parallel, lanes, vocab_field)
    yield from _pipeline_problems(shape.pattern, parallel)
    yield from _context_problems(shape, parallel)


def _tensor_problems(
    shape: ModelShape, parallel: ParallelConfig, lanes: int | None, vocab_field: str
) -> Iterator[Problem]:
    """A tensor-parallel rank owns whole groups, KV heads, lanes and vocabulary rows."""
    kinds = shape.pattern.kinds
    sizes = {vocab_field: shape.vocab}
    if LayerKind.MAMBA in kinds:
        sizes["model.mamba_groups"] = shape.mamba_groups
    if LayerKind.ATTENTION in kinds:
        sizes["model.kv_heads"] = shape.kv_heads
    if LayerKind.MLP in kinds:
        sizes |= {"model.ffn": math.gcd(*shape.ffn)} if lanes is None else {"lanes": lanes}
    broken = [f"{field} = {size}" for field, size in sizes.items() if size % parallel.tensor]
    if broken:
        nearest = nearest_divisor(parallel.tensor, math.gcd(*sizes.values()))
        rule = f"must divide {', '.join(broken)}"
        yield Problem("parallel.tensor", parallel.tensor, rule, f"nearest legal value is {nearest}")


def _pipeline_problems(pattern: LayerPattern, parallel: ParallelConfig) -> Iterator[Problem]:
    """Every stage needs a layer; the pattern may say where to cut with |, otherwise stages get equal work."""
    stages, marked = parallel.pipeline, len(pattern.segments)
    if marked > 1 and stages not in (1, marked):
        rule = f"must be the {marked} stages the | in model.pattern mark"
        yield Problem("parallel.pipeline", stages, rule, f"nearest legal value is {marked}")
    elif marked == 1 and stages > len(pattern):
        rule = f"must be at most the number of layers = {len(pattern)}"
        yield Problem("parallel.pipeline", stages, rule, f"nearest legal value is {len(pattern)}")


def _context_problems(shape: ModelShape, parallel: ParallelConfig) -> Iterator[Problem]:
    """Context parallelism spreads the Mamba heads and groups of a tensor-parallel rank over its ranks."""
    if LayerKind.MAMBA not in shape.pattern.kinds or shape.mamba_groups % parallel.tensor:
        return
    groups, heads = shape.mamba_groups // parallel.tensor, math.gcd(*shape.mamba_heads) // parallel.tensor
    if groups % parallel.context and parallel.context % groups:
        rule = f"must divide, or be a multiple of, the Mamba groups of one tensor-parallel rank = {groups}"
        nearest = nearest_divisor(parallel.context, groups)
    elif heads % parallel.context:
        rule = f"must divide the Mamba heads of one tensor-parallel rank = {heads}"
        nearest = nearest_divisor(parallel.context, heads)
    else:
        return
    yield Problem("parallel.context", parallel.context, rule, f"nearest legal value is {nearest}")


def sequence_problems(path: str, length: int, parallel: ParallelConfig) -> Iterator[Problem]:
    """A sequence must split into two chunks per context rank, then over tensor ranks under sequence parallelism."""
    context = 2 * parallel.context if parallel.context > 1 else 1
    tensor = parallel.tensor if parallel.sequence else 1
    multiple = math.lcm(context, parallel.context * tensor)
    yield from multiple_problem(path, length, multiple, "what parallel.context and parallel.sequence split it into")


def batch_problems(
    path: str, sequences: int, micro_batch: tuple[str, int], parallel: ParallelConfig, cluster: Cluster
) -> Iterator[Problem]:
    """A number of sequences must fill whole micro-batches, given as (field, value), on every replica."""
    replicas, (field, size) = data_parallel(parallel, cluster), micro_batch
    what = f"{field} x data-parallel size = {size} x {replicas}"
    yield from multiple_problem(path, sequences, size * replicas, what)


def check_validation(config: PretrainConfig | ElasticConfig | EvaluateConfig, cluster: Cluster) -> Iterator[Problem]:
    """Held-out sequences fill whole micro-batches."""
    data = config.data
    micro_batch = ("data.micro_batch", data.micro_batch)
    path = "data.validation_sequences"
    yield from batch_problems(path, data.validation_sequences, micro_batch, config.parallel, cluster)


def check_evaluation_length(config: EvaluateConfig, cluster: Cluster) -> Iterator[Problem]:
    """Evaluated sequences split over the ranks."""
    yield from sequence_problems("sequence_length", config.sequence_length, config.parallel)


def check_importance(config: ImportanceConfig, cluster: Cluster) -> Iterator[Problem]:
    """Calibration sequences fill whole micro-batches; the layers are scored on some of them."""
    section, parallel = config.importance, config.parallel
    micro_batch = ("importance.micro_batch", section.micro_batch)
    for name, sequences in (("num_sequences", section.num_sequences), ("depth_sequences", section.depth_sequences)):
        yield from batch_problems(f"importance.{name}", sequences, micro_batch, parallel, cluster)
    if section.depth_sequences > section.num_sequences:
        rule = f"must be at most importance.num_sequences = {section.num_sequences}"
        remedy = f"nearest legal value is {section.num_sequences}"
        yield Problem("importance.depth_sequences", section.depth_sequences, rule, remedy)
    yield from sequence_problems("importance.sequence_length", section.sequence_length, parallel)


def check_optimizer(config: TrainConfig, cluster: Cluster) -> Iterator[Problem]:
    """The distributed optimizer needs GPUs: with torch's AdamW a resume silently corrupts its state."""
    if config.optim.use_distributed_optimizer and not cluster.has_gpu:
        rule = "needs GPUs (resuming it with torch's AdamW on the CPU is broken upstream)"
        yield Problem("optim.use_distributed_optimizer", True, rule, "nearest legal value is false")


def check_exp_manager(config: TrainConfig, cluster: Cluster) -> Iterator[Problem]:
    """An existing run is either continued or replaced; a milestone is one of the steps that are saved."""
    if config.exp_manager.overwrite and config.exp_manager.resume_if_exists:
        rule = "contradicts exp_manager.resume_if_exists = true"
        yield Problem("exp_manager.overwrite", True, rule, "nearest legal value is false")
    if config.exp_manager.create_wandb_logger and importlib.util.find_spec("wandb") is None:
        remedy = 'pip install "wandb", or this project with its extra [wandb]; nearest legal value is false'
        yield Problem("exp_manager.create_wandb_logger", True, "the package wandb is not installed", remedy)
    yield from _accepted_problems(config)
    milestone, every = config.exp_manager.keep_milestones_every_n_steps, config.trainer.checkpoint_every_n_steps
    if milestone is not None:
        path = "exp_manager.keep_milestones_every_n_steps"
        yield from multiple_problem(path, milestone, every, "trainer.checkpoint_every_n_steps")


def _accepted_problems(config: TrainConfig) -> Iterator[Problem]:
    """A change is accepted by the name of its field; only a whole phase and the budgets are compared as one."""
    known = sorted(set(field_paths(type(config))))
    path = "exp_manager.accept_changes"
    for name in config.exp_manager.accept_changes:
        parts = name.split(".")
        plain = ".".join(part for part in parts if not part.isdigit())
        if plain == "elastic.budgets" or (len(parts) == 2 and plain == "curriculum"):
            continue
        inner = [f"{name}.{field.removeprefix(plain + '.')}" for field in known if field.startswith(plain + ".")]
        if inner:
            yield Problem(path, name, "is a section", f"name its fields: {', '.join(first_few(inner, 12))}")
        elif plain not in known and not plain.startswith("curriculum.budget_weights."):
            near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)
            yield Problem(path, name, "is no field of this config", f"nearest legal name is {near[0]}")


def check_timeouts(config: TrainConfig, cluster: Cluster) -> Iterator[Problem]:
    """The watchdog speaks first: a collective that times out ends the process without saying which rank stopped."""
    trainer = config.trainer
    if trainer.watchdog_timeout_s >= trainer.collective_timeout_s:
        rule = f"must be below trainer.collective_timeout_s = {trainer.collective_timeout_s:g}"
        remedy = f"two thirds of it, {trainer.collective_timeout_s * 2 / 3:g}, leaves time for the report"
        yield Problem("trainer.watchdog_timeout_s", trainer.watchdog_timeout_s, rule, remedy)
