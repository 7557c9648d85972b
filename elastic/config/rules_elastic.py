"""Rules of the curriculum, the space of subnets, the budgets and the distillation; each yields Problems."""

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from elastic.config.load import Problem, show
from elastic.config.rules_layout import (
    Cluster,
    batch_problems,
    data_parallel,
    multiple_problem,
    nearest_divisor,
    sequence_problems,
)
from elastic.config.serving import ExtractConfig, MembersConfig
from elastic.config.training import ElasticConfig, ElasticRunConfig, PretrainConfig
from elastic.router.phases import Curriculum, LearningRate, Phase
from elastic.space.axes import Axis, LayerKind
from elastic.space.cost import Budget, BudgetError, check_reachable
from elastic.space.gates import Execution
from elastic.space.ranges import MOST_STEPS
from elastic.space.reach import smallest_subnet
from elastic.space.shape import ModelShape
from elastic.space.space import Space, SpaceError

Training = PretrainConfig | ElasticConfig


def one_of_two(path: str, names: tuple[str, str], values: tuple[object, object]) -> Iterator[Problem]:
    """Yield a problem unless exactly one of two optional fields is given."""
    if (values[0] is None) == (values[1] is None):
        rule = f"exactly one of {names[0]} and {names[1]} must be given"
        remedy = (
            f"set {path}.{names[0]}=null" if values[0] is not None else f"set {path}.{names[0]} or {path}.{names[1]}"
        )
        yield Problem(f"{path}.{names[0]}", values[0], rule, remedy)


def unique_names(path: str, names: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for every name used more than once."""
    for name, count in Counter(names).items():
        if count > 1:
            last = len(names) - 1 - list(reversed(names)).index(name)
            rule = f"names must differ, this one stands {count} times"
            yield Problem(f"{path}.{last}.name", name, rule, f"choose another, for example {name}_{count}")


def check_phases(config: Training, cluster: Cluster) -> Iterator[Problem]:
    """Each phase has one length, a schedule that fits in it, and lengths and batches the layout can split."""
    yield from unique_names("curriculum", [phase.name for phase in config.curriculum])
    for index, phase in enumerate(config.curriculum):
        path = f"curriculum.{index}"
        yield from one_of_two(path, ("steps", "tokens"), (phase.steps, phase.tokens))
        yield from learning_rate_problems(f"{path}.lr", phase.lr, phase)
        if phase.steps is None and phase.tokens is not None and phase.num_steps > MOST_STEPS:
            rule = f"would take {phase.num_steps:,} steps of {phase.tokens_per_step:,} tokens, more than {MOST_STEPS:,}"
            yield Problem(
                f"{path}.tokens", phase.tokens, rule, f"nearest legal value is {MOST_STEPS * phase.tokens_per_step}"
            )
        yield from sequence_problems(f"{path}.sequence_length", phase.sequence_length, config.parallel)


def check_phase_batches(config: Training, cluster: Cluster) -> Iterator[Problem]:
    """Each phase's global batch fills whole micro-batches on every replica."""
    for index, phase in enumerate(config.curriculum):
        path, micro_batch = f"curriculum.{index}.global_batch", ("data.micro_batch", config.data.micro_batch)
        yield from batch_problems(path, phase.global_batch, micro_batch, config.parallel, cluster)


def check_draws(config: ElasticConfig, cluster: Cluster) -> Iterator[Problem]:
    """Every budget drawn in a step must serve equally many micro-batches of each replica."""
    draws = config.elastic.router.draws_per_step
    per_micro_batch = config.data.micro_batch * data_parallel(config.parallel, cluster)
    if draws is None or any(phase.global_batch % per_micro_batch for phase in config.curriculum):
        return
    micro_batches = {phase.name: phase.global_batch // per_micro_batch for phase in config.curriculum}
    broken = [f"{count} in {name}" for name, count in micro_batches.items() if count % draws]
    if broken:
        rule = f"must divide the micro-batches of one replica and step, {', '.join(broken)}"
        nearest = nearest_divisor(draws, math.gcd(*micro_batches.values()))
        yield Problem(
            "elastic.router.draws_per_step", draws, rule, f"nearest legal value is {nearest}, null follows them"
        )


def check_noise_draws(config: ElasticConfig, cluster: Cluster) -> Iterator[Problem]:
    """Every noise of the gates must serve equally many micro-batches of a step, all of one budget."""
    noise, replicas = config.elastic.router.noise_draws_per_step, data_parallel(config.parallel, cluster)
    if noise is None or any(phase.global_batch % (config.data.micro_batch * replicas) for phase in config.curriculum):
        return
    for phase in config.curriculum:
        micro_batches = phase.global_batch // config.data.micro_batch
        draws = config.elastic.router.draws_per_step or micro_batches // replicas
        if micro_batches % noise or noise % draws:
            rule = f"must divide the {micro_batches} micro-batches of a step in {phase.name} into whole parts of the "
            rule += f"{draws} budgets drawn for it"
            remedy = f"nearest legal value is {draws}, null draws for every micro-batch"
            yield Problem("elastic.router.noise_draws_per_step", noise, rule, remedy)
            return


def check_max_steps(config: Training, cluster: Cluster) -> Iterator[Problem]:
    """trainer.max_steps may stop a curriculum early; beyond its end there is nothing to run."""
    if any((phase.steps is None) == (phase.tokens is None) for phase in config.curriculum):
        return
    whole, limit = Curriculum(config.curriculum).total_steps, config.trainer.max_steps
    if limit is not None and limit > whole:
        rule = f"must be at most the {whole} steps of the curriculum"
        yield Problem("trainer.max_steps", limit, rule, f"nearest legal value is {whole}, null runs them all")


def learning_rate_problems(path: str, rate: LearningRate, phase: Phase) -> Iterator[Problem]:
    """A schedule falls from peak to min and warms up inside its phase."""
    if rate.schedule == "constant" and rate.min not in (0.0, rate.peak):
        rule, remedy = f"says nothing while {path}.schedule = constant", f"set {path}.schedule=cosine or {path}.min=0"
        yield Problem(f"{path}.min", rate.min, rule, remedy)
    elif rate.min > rate.peak:
        rule, remedy = f"must be at most {path}.peak = {rate.peak:g}", f"nearest legal value is {rate.peak:g}"
        yield Problem(f"{path}.min", rate.min, rule, remedy)
    if (phase.steps is None) == (phase.tokens is None):
        return
    if rate.warmup_steps > phase.num_steps:
        rule = f"must be at most the {phase.num_steps} steps of phase {phase.name}"
        remedy = f"nearest legal value is {phase.num_steps}"
        yield Problem(f"{path}.warmup_steps", rate.warmup_steps, rule, remedy)


def check_elastic_phases(config: ElasticConfig, cluster: Cluster) -> Iterator[Problem]:
    """Budget weights name budgets, temperatures fall, and slice execution needs choices that no longer move."""
    names = [budget.name for budget in config.elastic.budgets]
    for index, phase in enumerate(config.curriculum):
        path = f"curriculum.{index}"
        yield from learning_rate_problems(f"{path}.router_lr", phase.router_lr, phase)
        for name, weight in phase.budget_weights.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                rule = f"is not a budget of elastic.budgets ({', '.join(names)})"
                remedy = f"nearest legal name is {near}, {path}.budget_weights=null gives all the same weight"
                yield Problem(f"{path}.budget_weights.{name}", weight, rule, remedy)
        if phase.budget_weights and not any(phase.budget_weights.values()):
            rule = "at least one weight must be above 0"
            yield Problem(f"{path}.budget_weights", dict(phase.budget_weights), rule, "write null for equal weights")
        start, end = phase.temperature
        if end > start:
            rule, remedy = "the Gumbel temperature must not rise", f"nearest legal value is [{start:g}, {start:g}]"
            yield Problem(f"{path}.temperature", [start, end], rule, remedy)
        if phase.execution is Execution.SLICE and not phase.router_frozen:
            rule = f"a sliced forward gives the router no gradient, so it needs {path}.router_frozen = true"
            yield Problem(f"{path}.execution", "slice", rule, "nearest legal value is mask")
        if phase.execution is Execution.SLICE and config.optim.overlap_grad_reduce:
            rule = f"a skipped layer gets no gradient, so its bucket is never ready in {path}.execution = slice"
            yield Problem("optim.overlap_grad_reduce", True, rule, "nearest legal value is false")


def parent_shape(config: ElasticRunConfig) -> ModelShape:
    """Return the parent's shape; a vocabulary still unknown counts as one multiple."""
    return config.model.shape(config.model.vocab_multiple)


def check_space(config: ElasticRunConfig, cluster: Cluster) -> Iterator[Problem]:
    """Choices are what the nested layout allows; each axis is tried alone so that each gets its own message."""
    parent, section = parent_shape(config), config.elastic.space
    if LayerKind.MLP in parent.pattern.kinds and config.model.ffn % section.lanes:
        yield from multiple_problem("model.ffn", config.model.ffn, section.lanes, "elastic.space.lanes")
        return
    for name, number in section.keep_at_least.items():
        count = len(parent.pattern.layers_of(LayerKind[name.upper()]))
        if number > max(count, 1):
            rule, remedy = f"the parent has {count} layers of this kind", f"nearest legal value is {count}"
            yield Problem(f"elastic.space.keep_at_least.{name}", number, rule, remedy)
    for axis, choices in section.axes().items():
        try:
            Space(parent, {axis: choices}, section.lanes, keep_at_least=section.keep_at_least)
        except SpaceError as error:
            rule = str(error).removeprefix("space: ").replace(f"{axis.value}: ", "")
            legal = f"legal are the full width {_full_width(parent, axis)} first, then smaller multiples, for example"
            example = _example_choices(parent, section.lanes, axis)
            path = f"elastic.space.{axis.value}.choices"
            yield Problem(path, list(choices.choices), rule, f"{legal} {show(example)}")


def check_choice(config: ElasticConfig, cluster: Cluster) -> Iterator[Problem]:
    """A router needs something to choose: without it there is nothing to train, and one subnet is no family."""
    named = {axis.value: list(choices.choices) for axis, choices in config.elastic.space.axes().items()}
    if not any(len(choices) > 1 for choices in named.values()):
        example = _example_choices(parent_shape(config), config.elastic.space.lanes, Axis.HIDDEN)
        rule = "no axis has a second choice, so the family would be the parent alone"
        remedy = f"give at least one axis two, for example elastic.space.hidden.choices={show(example)}"
        yield Problem("elastic.space", named, rule, remedy)


def _full_width(parent: ModelShape, axis: Axis) -> int:
    return Space(parent=parent, axes={}, lanes=1).full_width(axis)


def _example_choices(parent: ModelShape, lanes: int, axis: Axis) -> list[int]:
    """Return legal choices at the full and at about three quarters and half of the width."""
    space = Space(parent=parent, axes={}, lanes=lanes)
    full, multiple = space.full_width(axis), space.parts(axis)
    smaller = {max(multiple, int(full * share) // multiple * multiple) for share in (0.75, 0.5)} if full else set()
    return sorted({full} | {width for width in smaller if width <= full}, reverse=True)


def check_context_choices(config: ElasticConfig, cluster: Cluster) -> Iterator[Problem]:
    """Every choice of Mamba heads must spread over tensor x context ranks."""
    ranks, chosen = config.parallel.tensor * config.parallel.context, config.elastic.space.mamba_head
    if config.parallel.context == 1 or chosen is None:
        return
    for index, choice in enumerate(chosen.choices):
        path = f"elastic.space.mamba_head.choices.{index}"
        yield from multiple_problem(path, choice, ranks, "parallel.tensor x parallel.context")


def check_budget_fields(config: ElasticRunConfig, cluster: Cluster) -> Iterator[Problem]:
    """Budgets have names of their own, and one way to say how much."""
    yield from unique_names("elastic.budgets", [budget.name for budget in config.elastic.budgets])
    for index, budget in enumerate(config.elastic.budgets):
        yield from one_of_two(f"elastic.budgets.{index}", ("target", "ratio"), (budget.target, budget.ratio))


def check_budgets(config: ElasticRunConfig, cluster: Cluster) -> Iterator[Problem]:
    """Every budget lies between the smallest subnet and the parent."""
    if config.model.vocab is None:
        return
    space, deployment = config.space(), config.elastic.deployment
    smallest = smallest_subnet(space)
    for index, section in enumerate(config.elastic.budgets):
        if (section.target is None) == (section.ratio is None):
            continue
        try:
            check_reachable(section.absolute(space.parent, deployment), space.parent, smallest, deployment)
        except BudgetError as error:
            yield _unreachable(f"elastic.budgets.{index}", section, str(error))


def _unreachable(path: str, section: Budget, message: str) -> Problem:
    rule, _, remedy = message.removeprefix(f"budget {section.name}: ").partition("; ")
    name, value = ("target", section.target) if section.target is not None else ("ratio", section.ratio)
    return Problem(f"{path}.{name}", value, rule, remedy or "choose smaller widths")


def check_distill(config: ElasticConfig, cluster: Cluster) -> Iterator[Problem]:
    """The loss needs a term, and chunks need tokens."""
    distill = config.distill
    if distill.kl_weight == 0 and distill.cross_entropy_weight == 0:
        rule = "distill.kl_weight and distill.cross_entropy_weight must not both be 0"
        yield Problem("distill.kl_weight", 0.0, rule, "nearest legal value is 1.0")


def check_num_chunks(config: ElasticConfig, cluster: Cluster) -> Iterator[Problem]:
    """A micro-batch must have a token for every chunk."""
    shortest = min(phase.sequence_length for phase in config.curriculum) // config.parallel.context
    tokens = max(1, shortest * config.data.micro_batch)
    if config.distill.num_chunks > tokens:
        rule = f"must be at most the {tokens} tokens of the shortest micro-batch"
        yield Problem("distill.num_chunks", config.distill.num_chunks, rule, f"nearest legal value is {tokens}")


def check_subnets(config: MembersConfig, cluster: Cluster) -> Iterator[Problem]:
    """Something is asked for, and subnets given by hand have names of their own, apart from the budgets'."""
    if config.budget_names == () and not config.subnets:
        yield Problem("budget_names", [], "names nothing, and no subnets are given", "null takes all budgets")
    yield from unique_names("subnets", [subnet.name for subnet in config.subnets])


def check_export(config: ExtractConfig, cluster: Cluster) -> Iterator[Problem]:
    """Extract must have something to write."""
    if not config.export.hugging_face and not config.export.megatron:
        rule = "export.hugging_face and export.megatron must not both be false"
        yield Problem("export.hugging_face", False, rule, "nearest legal value is true")
