"""Rules of the curriculum, the space of subnets, the budgets and the distillation; each yields Problems.

The parameters of a `check_...` are the sections it reads (rules.py).
"""

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from elastic.config import rules_layout, sections
from elastic.config.inputs import SubnetConfig
from elastic.config.load import Problem, Problems, show
from elastic.config.rules_layout import Cluster, at_most_problem, data_parallel, multiple_problem, nearest_divisor
from elastic.config.sections import DataConfig, ElasticSection, ModelConfig, ParallelConfig
from elastic.router.phases import Curriculum, ElasticPhase, LearningRate, Phase
from elastic.space.axes import Axis, LayerKind
from elastic.space.cost import MEASURED, Budget
from elastic.space.gates import Execution
from elastic.space.layers import FP8_MULTIPLE, DimKind, parameter_dims, parameter_names, split_parameter_name
from elastic.space.nesting import parameter_size
from elastic.space.ranges import LEAST_SHARE, MOST_STEPS
from elastic.space.reach import out_of_reach
from elastic.space.shape import ModelShape
from elastic.space.space import Space, SpaceError

Phases = tuple[Phase, ...]


def one_of_two(path: str, **values: object) -> Problems:
    """Yield a problem unless exactly one of two optional fields of `path` is given."""
    (first, value), (second, other) = values.items()
    if (value is None) == (other is None):
        remedy = f"set {path}.{first}" + ("=null" if value is not None else f" or {path}.{second}")
        yield Problem(f"{path}.{first}", value, f"exactly one of {first} and {second} must be given", remedy)


def unique_names(path: str, members: Sequence[Phase | Budget | SubnetConfig]) -> Problems:
    """Yield a problem for every name used more than once."""
    names = [member.name for member in members]
    for name, count in Counter(names).items():
        if count > 1:
            last = len(names) - 1 - names[::-1].index(name)
            rule = f"names must differ, this one stands {count} times"
            yield Problem(f"{path}.{last}.name", name, rule, f"choose another, for example {name}_{count}")


def _layout(phase: Phase, parallel: ParallelConfig) -> ParallelConfig:
    return replace(parallel, **phase.own_layout)


def check_phases(curriculum: Phases, parallel: ParallelConfig) -> Problems:
    """Each phase has one length, a schedule that fits in it, and sequences the layout can split."""
    yield from unique_names("curriculum", curriculum)
    for index, phase in enumerate(curriculum):
        path = f"curriculum.{index}"
        yield from one_of_two(path, steps=phase.steps, tokens=phase.tokens)
        yield from learning_rate_problems(f"{path}.lr", phase.lr, phase)
        if phase.steps is None and phase.tokens is not None and phase.num_steps > MOST_STEPS:
            rule = f"would take {phase.num_steps:,} steps of {phase.tokens_per_step:,} tokens, more than {MOST_STEPS:,}"
            remedy = f"nearest legal value is {MOST_STEPS * phase.tokens_per_step}"
            yield Problem(f"{path}.tokens", phase.tokens, rule, remedy)
        yield from rules_layout.sequence_problems(
            f"{path}.sequence_length", phase.sequence_length, _layout(phase, parallel)
        )


def check_phase_batches(curriculum: Phases, data: DataConfig, parallel: ParallelConfig, cluster: Cluster) -> Problems:
    """Each phase's global batch fills whole micro-batches on every replica."""
    for index, phase in enumerate(curriculum):
        path, section = f"curriculum.{index}", "data" if phase.micro_batch is None else f"curriculum.{index}"
        size, layout = phase.micro_batch or data.micro_batch, _layout(phase, parallel)
        yield from rules_layout.batch_problems(
            f"{path}.global_batch", phase.global_batch, section, size, layout, cluster
        )


def check_blend_weights(curriculum: Phases, data: DataConfig) -> Problems:
    """What a phase reads instead is of the blend, and something."""
    for index, phase in enumerate(curriculum):
        yield from weight_problems(
            f"curriculum.{index}.blend_weights", phase.blend_weights, "a source of data.blend", data.names
        )
        given = [weight for weight in phase.blend_weights.values() if weight]
        if given and min(given) < LEAST_SHARE * sum(given):
            rule, remedy = "one weight is less than a millionth of all", "leave that source out"
            yield Problem(f"curriculum.{index}.blend_weights", dict(phase.blend_weights), rule, remedy)


def weight_problems(path: str, weights: Mapping[str, float], what: str, names: Sequence[str]) -> Problems:
    """Weights that a phase gives have names of the whole run's, `what` each is called, and are not all 0."""
    default = "takes those of data.blend" if what.endswith("blend") else "gives all the same weight"
    for name, weight in weights.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            nearest = f"nearest legal name is {near[0]}, " if near else ""
            rule, remedy = f"is not {what} ({', '.join(names)})", f"{nearest}{path}=null {default}"
            yield Problem(f"{path}.{name}", weight, rule, remedy)
    if weights and not any(weights.values()):
        remedy = "write null for equal weights" if default.endswith("weight") else f"{path}=null {default}"
        yield Problem(path, dict(weights), "at least one weight must be above 0", remedy)


def check_draws(
    curriculum: Phases, elastic: ElasticSection, data: DataConfig, parallel: ParallelConfig, cluster: Cluster
) -> Problems:
    """Budgets drawn in a step serve equally many whole micro-batches of all replicas; noises of gates, too."""
    replicas = {phase.name: data_parallel(_layout(phase, parallel), cluster) for phase in curriculum}
    if any(
        phase.global_batch % ((phase.micro_batch or data.micro_batch) * replicas[phase.name]) for phase in curriculum
    ):
        return  # check_phase_batches says so
    counts = {phase.name: phase.global_batch // (phase.micro_batch or data.micro_batch) for phase in curriculum}
    draws, noise = elastic.router.draws_per_step, elastic.router.noise_draws_per_step
    broken = [f"{count} in {name}" for name, count in counts.items() if draws is not None and count % draws]
    if draws is not None and broken:
        rule = f"must divide the micro-batches of a step, each of which has one budget: {', '.join(broken)}"
        nearest = nearest_divisor(draws, math.gcd(*counts.values()))
        remedy = f"nearest legal value is {nearest}, null draws one for each micro-batch of a replica"
        yield Problem("elastic.router.draws_per_step", draws, rule, remedy)
    for name, whole in counts.items():
        drawn = draws or whole // replicas[name]
        if noise is not None and (whole % noise or noise % drawn):
            parts = f"into whole parts of the {drawn} budgets drawn for it"
            remedy = f"nearest legal value is {drawn}, null draws for every micro-batch"
            rule = f"must divide the {whole} micro-batches of a step in {name} {parts}"
            yield Problem("elastic.router.noise_draws_per_step", noise, rule, remedy)
            return


def check_max_steps(curriculum: Phases, trainer: sections.TrainerConfig) -> Problems:
    """trainer.max_steps may stop a curriculum early; beyond its end there is nothing to run."""
    if trainer.max_steps is not None and all(map(_has_length, curriculum)):
        whole = Curriculum(curriculum).total_steps
        what, more = f"the {whole} steps of the curriculum", ", null runs them all"
        yield from at_most_problem("trainer.max_steps", trainer.max_steps, whole, what, more)


def _has_length(phase: Phase) -> bool:
    return (phase.steps is None) != (phase.tokens is None)


def learning_rate_problems(path: str, rate: LearningRate, phase: Phase) -> Problems:
    """A schedule falls from peak to min and warms up inside its phase."""
    if rate.schedule == "constant" and rate.min not in (0.0, rate.peak):
        rule, remedy = f"says nothing while {path}.schedule = constant", f"set {path}.schedule=cosine or {path}.min=0"
        yield Problem(f"{path}.min", rate.min, rule, remedy)
    else:
        yield from at_most_problem(f"{path}.min", rate.min, rate.peak, f"{path}.peak = {rate.peak:g}")
    if _has_length(phase):
        what = f"the {phase.num_steps} steps of phase {phase.name}"
        yield from at_most_problem(f"{path}.warmup_steps", rate.warmup_steps, phase.num_steps, what)


def check_elastic_phases(curriculum: tuple[ElasticPhase, ...], elastic: ElasticSection) -> Problems:
    """Budget weights name budgets, temperatures fall, and slice execution needs choices that no longer move."""
    names = [budget.name for budget in elastic.budgets]
    for index, phase in enumerate(curriculum):
        path = f"curriculum.{index}"
        yield from learning_rate_problems(f"{path}.router_lr", phase.router_lr, phase)
        yield from weight_problems(f"{path}.budget_weights", phase.budget_weights, "a budget of elastic.budgets", names)
        start, end = phase.temperature
        if end > start:
            rule, remedy = "the Gumbel temperature must not rise", f"nearest legal value is [{start:g}, {start:g}]"
            yield Problem(f"{path}.temperature", [start, end], rule, remedy)
        if phase.execution is Execution.SLICE and not phase.router_frozen:
            rule = f"a sliced forward gives the router no gradient, so it needs {path}.router_frozen = true"
            yield Problem(f"{path}.execution", "slice", rule, "nearest legal value is mask")


def check_space(model: ModelConfig, elastic: ElasticSection) -> Problems:
    """Choices are what the nested layout allows; each axis is tried alone so that each gets its own message."""
    parent, space = model.shape(model.vocab_multiple), elastic.space
    if LayerKind.MLP in parent.pattern.kinds and model.ffn % space.lanes:
        yield from multiple_problem("model.ffn", model.ffn, space.lanes, "elastic.space.lanes")
        return
    for name, number in space.keep_at_least.items():
        count = len(parent.pattern.layers_of(LayerKind[name.upper()]))
        if number > max(count, 1):
            rule, remedy = f"the parent has {count} layers of this kind", f"nearest legal value is {count}"
            yield Problem(f"elastic.space.keep_at_least.{name}", number, rule, remedy)
    for axis, choices in space.axes().items():
        try:
            Space(parent, {axis: choices}, space.lanes, keep_at_least=space.keep_at_least)
        except SpaceError as error:
            rule = str(error).removeprefix("space: ").replace(f"{axis.value}: ", "")
            example = _example_choices(parent, space.lanes, axis)
            remedy = f"legal are the full width {example[0]} first, then smaller multiples, for example {show(example)}"
            yield Problem(f"elastic.space.{axis.value}.choices", list(choices.choices), rule, remedy)


def check_choice(model: ModelConfig, elastic: ElasticSection) -> Problems:
    """A router needs something to choose: without it there is nothing to train, and one subnet is no family."""
    named = {axis.value: list(choices.choices) for axis, choices in elastic.space.axes().items()}
    if not any(len(choices) > 1 for choices in named.values()):
        example = _example_choices(model.shape(model.vocab_multiple), elastic.space.lanes, Axis.HIDDEN)
        rule = "no axis has a second choice, so the family would be the parent alone"
        remedy = f"give at least one axis two, for example elastic.space.hidden.choices={show(example)}"
        yield Problem("elastic.space", named, rule, remedy)


def _example_choices(parent: ModelShape, lanes: int, axis: Axis) -> list[int]:
    """Return legal choices at the full and at about three quarters and half of the width."""
    space = Space(parent=parent, axes={}, lanes=lanes)
    full, multiple = space.full_width(axis), space.parts(axis)
    smaller = {max(multiple, int(full * share) // multiple * multiple) for share in (0.75, 0.5)} if full else set()
    return sorted({full} | {width for width in smaller if width <= full}, reverse=True)


def check_context_choices(model: ModelConfig, elastic: ElasticSection, parallel: ParallelConfig) -> Problems:
    """Every choice of Mamba heads must spread over tensor x context ranks."""
    chosen, ranks = elastic.space.mamba_head, parallel.tensor * parallel.context
    for index, choice in enumerate(chosen.choices if chosen is not None and parallel.context > 1 else ()):
        path = f"elastic.space.mamba_head.choices.{index}"
        yield from multiple_problem(path, choice, ranks, "parallel.tensor x parallel.context")


def check_budget_fields(elastic: ElasticSection) -> Problems:
    """Budgets have names of their own, and one way to say how much."""
    yield from unique_names("elastic.budgets", elastic.budgets)
    for index, budget in enumerate(elastic.budgets):
        yield from one_of_two(f"elastic.budgets.{index}", target=budget.target, ratio=budget.ratio)


def check_budgets(model: ModelConfig, elastic: ElasticSection, depth_ranking: tuple[int, ...] = ()) -> Problems:
    """Every budget lies between the smallest subnet, of the layers that rank best, and the parent."""
    if model.vocab is None:
        return
    shape, deployment = model.shape(), elastic.deployment
    of_these = len(depth_ranking) == len(shape.pattern)  # else model_problems says that the parent is another
    space = elastic.space.space(shape, depth_ranking if of_these else ())
    for index, budget in enumerate(elastic.budgets):
        name, value = ("ratio", budget.ratio) if budget.target is None else ("target", budget.target)
        is_one = (budget.target is None) != (budget.ratio is None)  # else check_budget_fields says so
        if not is_one or (budget.metric in MEASURED and deployment.measured is None):  # check_latency says that
            continue
        # A rate that is a target is judged, and told, as the rate it is.
        asked = budget if name == "target" else budget.absolute(space.parent, deployment)
        if why := out_of_reach(space, asked, deployment, as_ratio=name == "ratio"):
            yield Problem(f"elastic.budgets.{index}.{name}", value, *why)


def check_distill(distill: sections.DistillConfig) -> Problems:
    """The loss needs a term; a teacher that learns has no copy to quantise."""
    if distill.kl_weight == 0 and distill.cross_entropy_weight == 0:
        rule = "distill.kl_weight and distill.cross_entropy_weight must not both be 0"
        yield Problem("distill.kl_weight", 0.0, rule, "nearest legal value is 1.0")
    if distill.teacher == "trained" and distill.teacher_precision == "fp8":
        rule = "is for a frozen teacher, and distill.teacher = trained learns in the student's own weights"
        yield Problem("distill.teacher_precision", "fp8", rule, "nearest legal value is bf16")


def fp8_problems(section: str, precision: str, cluster: Cluster) -> Problems:
    """A teacher in FP8, which `section` (with its dot) asks for, needs GPUs that multiply it."""
    if precision == "fp8" and not cluster.multiplies_fp8:
        rule = "needs GPUs of compute capability 8.9 or higher (Ada, Hopper and later)"
        yield Problem(f"{section}teacher_precision", "fp8", rule, "nearest legal value is bf16")


def check_fp8_sizes(
    model: ModelConfig, parallel: ParallelConfig, distill: sections.DistillConfig, cluster: Cluster
) -> Problems:
    """The parent's projections on a rank have sizes that a GPU's FP8 products take, where they are the teacher's."""
    if distill.teacher_precision != "fp8" or not (cluster.has_gpu and cluster.multiplies_fp8):
        return
    shape, tensor = model.shape(model.vocab_multiple), parallel.tensor
    if (odd := _odd_in_fp8(shape, tensor)) is not None:
        lower = (size for size in range(tensor - 1, 0, -1) if tensor % size == 0 and _odd_in_fp8(shape, size) is None)
        remedy = "".join(f", or set parallel.tensor={size}" for size in islice(lower, 1))
        rule = f"takes rows and columns in multiples of {FP8_MULTIPLE}, and parallel.tensor = {tensor} leaves {odd}"
        yield Problem("distill.teacher_precision", "fp8", rule, f"nearest legal value is bf16{remedy}")


def _odd_in_fp8(shape: ModelShape, tensor: int) -> str | None:
    """Name a projection whose size on one of `tensor` ranks FP8 products refuse, with that size; None: they fit."""
    for rest, name in {split_parameter_name(name)[1]: name for name in parameter_names(shape)}.items():
        dims = parameter_dims(name)
        ranks = [tensor if dim.is_sharded else 1 for dim in dims]
        fulls = parameter_size(name, shape)
        if len(dims) != 2 or DimKind.VOCAB in dims or any(full % by for full, by in zip(fulls, ranks, strict=True)):
            continue  # a size that does not split is said elsewhere
        rows, columns = (full // by for full, by in zip(fulls, ranks, strict=True))
        if rows % FP8_MULTIPLE or columns % FP8_MULTIPLE:
            return f"{rest} {rows} x {columns}"
    return None
