"""Rules of the model's sizes, the parallel layout, the batches and the run; each yields one Problem per mistake.

The parameters of a `check_...` are the sections it reads (rules.py).
"""

import difflib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic.config import sections
from elastic.config.load import Problem, Problems, field_paths, plain_number
from elastic.config.sections import ModelConfig, ParallelConfig
from elastic.config.verbs import ImportanceSection
from elastic.space.axes import LayerKind
from elastic.space.ranges import MOST_LAYERS
from elastic.space.shape import LayerPattern, ModelShape, PatternError
from elastic.world.files import first_few


@dataclass(frozen=True)
class Cluster:
    """What the run was started on: processes in all, whether they have GPUs, and what is missing there.

    `missing` maps a part of a GPU run (attention, scan, Adam) to its package and what stands in for it.
    """

    num_processes: int = 1
    has_gpu: bool = False
    missing: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    multiplies_fp8: bool = True


def nearest_multiple(value: int, multiple: int) -> int:
    """Return the multiple closest to `value`, at least one `multiple`."""
    return max(1, round(value / multiple)) * multiple


def nearest_divisor(value: int, number: int) -> int:
    """Return the divisor of `number` closest to `value`, the smaller of two equally close ones."""
    divisors = (d for k in range(1, math.isqrt(number) + 1) if number % k == 0 for d in (k, number // k))
    return min(divisors, key=lambda divisor: (abs(divisor - value), divisor))


def multiple_problem(path: str, value: int, multiple: int, of_what: str) -> Problems:
    """Yield a problem unless `value` is a multiple of `multiple`, which `of_what` explains."""
    if value % multiple:
        remedy = f"nearest legal value is {nearest_multiple(value, multiple)}"
        yield Problem(path, value, f"must be a multiple of {of_what} = {multiple}", remedy)


def at_most_problem(path: str, value: float, limit: float, what: str, more: str = "") -> Problems:
    """Yield a problem if `value` is above `limit`, which `what` writes out; `more` ends the remedy."""
    if value > limit:
        yield Problem(path, value, f"must be at most {what}", f"nearest legal value is {plain_number(limit)}{more}")


def data_parallel(parallel: ParallelConfig, cluster: Cluster) -> int:
    """Return the number of replicas; 1 while the layout does not fit the processes, which check_world reports."""
    return 1 if cluster.num_processes % parallel.model_size else cluster.num_processes // parallel.model_size


def check_model(model: ModelConfig) -> Problems:
    """The layer pattern must parse, by the one parser, and heads must fill whole groups."""
    try:
        layers = len(LayerPattern.parse(model.pattern))
    except PatternError as error:
        yield Problem("model.pattern", model.pattern, str(error).rstrip("."), "write a pattern like M-M*-")
        return
    if layers > MOST_LAYERS:
        rule = f"must have at most {MOST_LAYERS} layers, it has {layers}"
        yield Problem("model.pattern", model.pattern, rule, "leave some out")
        return
    yield from multiple_problem("model.mamba_heads", model.mamba_heads, model.mamba_groups, "model.mamba_groups")
    yield from multiple_problem("model.attention_heads", model.attention_heads, model.kv_heads, "model.kv_heads")


def check_world(parallel: ParallelConfig, cluster: Cluster) -> Problems:
    """Replicas must fill the processes, and sequence parallelism needs tensor parallelism."""
    size, world = parallel.model_size, cluster.num_processes
    if world % size:
        remedy = f"nearest legal value is {nearest_divisor(size, world)}, or start {math.ceil(world / size) * size}"
        rule = f"must divide the number of processes = {world}"
        yield Problem("parallel.tensor x pipeline x context", size, rule, f"{remedy} processes")
    if parallel.sequence and parallel.tensor == 1:
        rule = "splits the sequence over tensor-parallel ranks and needs parallel.tensor > 1"
        yield Problem("parallel.sequence", True, rule, "nearest legal value is false")


def check_one_process(cluster: Cluster) -> Problems:
    """A verb that streams from disk to disk has nothing to share out."""
    if cluster.num_processes > 1:
        rule = "this verb streams through one process, whatever the layout of the checkpoint"
        remedy = "nearest legal value is 1: leave torchrun out"
        yield Problem("number of processes", cluster.num_processes, rule, remedy)


def model_layout_problems(model: ModelConfig, parallel: ParallelConfig, lanes: int | None) -> Problems:
    """The model must split over the ranks of a replica: a nested FFN by `lanes`, any other one anywhere."""
    vocab_field = "model.vocab" if model.vocab is not None else "model.vocab_multiple"
    return layout_problems(model.shape(model.vocab_multiple), parallel, lanes, vocab_field)


def layout_problems(
    shape: ModelShape, parallel: ParallelConfig, lanes: int | None, vocab_field: str = "model.vocab"
) -> Problems:
    """Yield what keeps a model of `shape` from splitting over tensor, pipeline and context ranks.

    A tensor-parallel rank owns whole groups, KV heads, lanes and vocabulary rows. Every stage needs a layer; the
    pattern may say where to cut with |, otherwise stages get equal work. Context parallelism spreads the Mamba heads
    and groups of a tensor-parallel rank over its ranks.
    """
    kinds, tensor, stages, context = shape.pattern.kinds, parallel.tensor, parallel.pipeline, parallel.context
    sizes = {vocab_field: shape.vocab}
    if LayerKind.MAMBA in kinds:
        sizes["model.mamba_groups"] = shape.mamba_groups
    if LayerKind.ATTENTION in kinds:
        sizes["model.kv_heads"] = shape.kv_heads
    if LayerKind.MLP in kinds:
        sizes |= {"model.ffn": math.gcd(*shape.ffn)} if lanes is None else {"lanes": lanes}
    broken = [f"{field} = {size}" for field, size in sizes.items() if size % tensor]
    if broken:
        nearest = nearest_divisor(tensor, math.gcd(*sizes.values()))
        rule = f"must divide {', '.join(broken)}"
        yield Problem("parallel.tensor", tensor, rule, f"nearest legal value is {nearest}")
    marked, layers = len(shape.pattern.segments), len(shape.pattern)
    if marked > 1 and stages not in (1, marked):
        rule = f"must be the {marked} stages the | in model.pattern mark"
        yield Problem("parallel.pipeline", stages, rule, f"nearest legal value is {marked}")
    elif marked == 1:
        yield from at_most_problem("parallel.pipeline", stages, layers, f"the number of layers = {layers}")
    if LayerKind.MAMBA not in kinds or shape.mamba_groups % tensor:
        return
    groups, heads = shape.mamba_groups // tensor, math.gcd(*shape.mamba_heads) // tensor
    if groups % context and context % groups:
        size, rule = groups, "divide, or be a multiple of, the Mamba groups of one tensor-parallel rank"
    elif heads % context:
        size, rule = heads, "divide the Mamba heads of one tensor-parallel rank"
    else:
        return
    remedy = f"nearest legal value is {nearest_divisor(context, size)}"
    yield Problem("parallel.context", context, f"must {rule} = {size}", remedy)


def sequence_problems(path: str, length: int, parallel: ParallelConfig) -> Problems:
    """A sequence must split into two chunks per context rank, then over tensor ranks under sequence parallelism."""
    context = 2 * parallel.context if parallel.context > 1 else 1
    tensor = parallel.tensor if parallel.sequence else 1
    multiple = math.lcm(context, parallel.context * tensor)
    return multiple_problem(path, length, multiple, "what parallel.context and parallel.sequence split it into")


def batch_problems(
    path: str, sequences: int, section: str, size: int, parallel: ParallelConfig, cluster: Cluster
) -> Problems:
    """A number of sequences must fill whole micro-batches, of `size` in `section`, on every replica."""
    replicas = data_parallel(parallel, cluster)
    what = f"{section}.micro_batch x data-parallel size = {size} x {replicas}"
    return multiple_problem(path, sequences, size * replicas, what)


def check_validation(data: sections.DataConfig, parallel: ParallelConfig, cluster: Cluster) -> Problems:
    """Held-out sequences fill whole micro-batches."""
    path, size = "data.validation_sequences", data.micro_batch
    return batch_problems(path, data.validation_sequences, "data", size, parallel, cluster)


def check_importance(importance: ImportanceSection, parallel: ParallelConfig, cluster: Cluster) -> Problems:
    """Calibration sequences fill whole micro-batches; the layers are scored on some of them."""
    scored, used, size = importance.num_sequences, importance.depth_sequences, importance.micro_batch
    for name, sequences in (("num_sequences", scored), ("depth_sequences", used)):
        yield from batch_problems(f"importance.{name}", sequences, "importance", size, parallel, cluster)
    yield from at_most_problem("importance.depth_sequences", used, scored, f"importance.num_sequences = {scored}")
    yield from sequence_problems("importance.sequence_length", importance.sequence_length, parallel)


def check_optimizer(optim: sections.OptimConfig, cluster: Cluster) -> Problems:
    """The distributed optimizer needs a fused Adam: with torch's AdamW a resume silently corrupts its state."""
    path, broken = "optim.use_distributed_optimizer", "(resuming it with torch's AdamW"
    if optim.use_distributed_optimizer and not cluster.has_gpu:
        rule = f"needs GPUs {broken} on the CPU is broken upstream)"
        yield Problem(path, True, rule, "nearest legal value is false")
    elif optim.use_distributed_optimizer and "Adam" in cluster.missing:
        rule = f"needs a fused Adam {broken} is broken upstream)"
        yield Problem(path, True, rule, "install transformer-engine or apex; nearest legal value is false")
    if optim.overlap_param_gather and not optim.use_distributed_optimizer:
        rule = f"every rank steps all its weights with {path} = false, so there is nothing to gather"
        yield Problem("optim.overlap_param_gather", True, rule, "nearest legal value is false")


def check_kernels(trainer: sections.ComputeConfig, cluster: Cluster) -> Problems:
    """A run that requires the fast kernels does not start on slower ones."""
    for part, (package, instead) in cluster.missing.items() if trainer.kernels == "required" else ():
        rule = f"{package} is missing or does not load: {part} would be {instead}"
        yield Problem("trainer.kernels", "required", rule, f"install {package}, or set trainer.kernels=auto")


def check_context_kernels(parallel: ParallelConfig, cluster: Cluster) -> Problems:
    """PyTorch's attention on a GPU, which would need a mask of all pairs, takes no part of a sequence."""
    if parallel.context > 1 and cluster.has_gpu and "attention" in cluster.missing:
        package, instead = cluster.missing["attention"]
        rule = f"{package} is missing or does not load, and {instead} takes whole sequences"
        remedy = f"install {package}, or set parallel.context=1 and parallel.tensor higher"
        yield Problem("parallel.context", parallel.context, rule, remedy)


def check_exp_manager(
    exp_manager: sections.TrainExpManagerConfig, trainer: sections.TrainerConfig, config: object
) -> Problems:
    """An existing run is either continued or replaced; a milestone is one of the steps that are saved."""
    if exp_manager.overwrite and exp_manager.resume_if_exists:
        rule = "contradicts exp_manager.resume_if_exists = true"
        yield Problem("exp_manager.overwrite", True, rule, "nearest legal value is false")
    if exp_manager.create_wandb_logger and importlib.util.find_spec("wandb") is None:
        remedy = 'pip install "wandb", or this project with its extra [wandb]; nearest legal value is false'
        yield Problem("exp_manager.create_wandb_logger", True, "the package wandb is not installed", remedy)
    yield from _accepted_problems(exp_manager.accept_changes, sorted(set(field_paths(type(config)))))
    milestone, every = exp_manager.keep_milestones_every_n_steps, trainer.checkpoint_every_n_steps
    if milestone is not None:
        path = "exp_manager.keep_milestones_every_n_steps"
        yield from multiple_problem(path, milestone, every, "trainer.checkpoint_every_n_steps")


def _accepted_problems(accepted: tuple[str, ...], known: list[str]) -> Problems:
    """A change is accepted by the name of its field; only a whole phase, budgets and a blend are compared as one."""
    path = "exp_manager.accept_changes"
    for name in accepted:
        parts = name.split(".")
        plain = ".".join(part for part in parts if not part.isdigit())
        if plain in ("elastic.budgets", "data.blend") or (len(parts) == 2 and plain == "curriculum"):
            continue
        inner = [f"{name}.{field.removeprefix(plain + '.')}" for field in known if field.startswith(plain + ".")]
        if inner:
            yield Problem(path, name, "is a section", f"name its fields: {', '.join(first_few(inner, 12))}")
        elif plain not in known and not plain.startswith(("curriculum.budget_weights.", "curriculum.blend_weights.")):
            near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)
            yield Problem(path, name, "is no field of this config", f"nearest legal name is {near[0]}")


def check_timeouts(trainer: sections.TrainerConfig) -> Problems:
    """The watchdog speaks first: a collective that times out ends the process without saying which rank stopped."""
    watchdog, collective = trainer.watchdog_timeout_s, trainer.collective_timeout_s
    if watchdog >= collective:
        rule = f"must be below trainer.collective_timeout_s = {collective:g}"
        remedy = f"two thirds of it, {collective * 2 / 3:g}, leaves time for the report"
        yield Problem("trainer.watchdog_timeout_s", watchdog, rule, remedy)
