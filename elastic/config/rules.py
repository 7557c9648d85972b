"""The table of rules between fields, which a recipe checks before any process group starts, and those of served models.

A rule runs only when the sections it reads loaded without a problem of their own, so one mistake is reported once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

from elastic.config import inputs, latency, rules_elastic, rules_layout, sections, verbs
from elastic.config.export import ExportConfig
from elastic.config.load import Problem, Problems
from elastic.config.rules_elastic import fp8_problems, unique_names
from elastic.config.rules_layout import Cluster, model_layout_problems, sequence_problems
from elastic.config.tasks import EvaluateTasksConfig, check_tasks_package, check_tasks_source
from elastic.space.ranges import LEAST_SHARE

Subnets = tuple[inputs.SubnetConfig, ...]


def check_subnets(budget_names: tuple[str, ...] | None, subnets: Subnets) -> Problems:
    """Something is asked for, and subnets given by hand have names of their own, apart from the budgets'."""
    if budget_names == () and not subnets:
        yield Problem("budget_names", [], "names nothing, and no subnets are given", "null takes all budgets")
    yield from unique_names("subnets", subnets)


def check_buckets(position_buckets: int, sequence_length: int) -> Problems:
    """Every part of the sequence has a token."""
    rule = f"sequence_length = {sequence_length}"
    yield from rules_layout.at_most_problem("position_buckets", position_buckets, sequence_length, rule)


def check_numbers(num_priced: int, num_scored: int) -> Problems:
    """No more subnets are scored than are priced."""
    yield from rules_layout.at_most_problem("num_scored", num_scored, num_priced, f"num_priced = {num_priced}")


def check_starts(init_from: inputs.OptionalParentInput, elastic: sections.ElasticSection) -> Problems:
    """A subnet that the router starts with is a budget's, by its name."""
    yield from unique_names("init_from.subnets", init_from.subnets)
    names = [budget.name for budget in elastic.budgets]
    for index, given in enumerate(init_from.subnets):
        if given.name not in names:
            rule = f"is none of elastic.budgets ({', '.join(names)})"
            yield Problem(f"init_from.subnets.{index}.name", given.name, rule, "add a budget of that name")
        if given.params is not None:
            rule, remedy = "is a size, and a start has widths", "give widths, or what recipes/search.py wrote"
            yield Problem(f"init_from.subnets.{index}.params", given.params, rule, remedy)


def check_data(data: sections.PreparedData) -> Problems:
    """There is one prepared folder or a blend, whose sources have names and shares that can be kept."""
    if bool(data.path) == bool(data.blend):
        rule = "contradicts data.blend" if data.path else "missing, it has no default"
        remedy = "set data.path=..., the folder recipes/prepare_data.py wrote, or data.blend"
        yield Problem("data.path", data.path or None, rule, "give one of the two" if data.path else remedy)
    names, whole = data.names, sum(source.weight for source in data.blend)
    for index, (name, source) in enumerate(zip(names, data.blend, strict=True)):
        if name in names[:index]:
            rule = f"names must differ, and {name} stands for data.blend.{names.index(name)}, too"
            remedy = f"give it another, for example {name}_{names[: index + 1].count(name)}"
            yield Problem(f"data.blend.{index}.name", source.name, rule, remedy)
        if source.weight < LEAST_SHARE * whole:
            rule = f"is less than a millionth of all weights, which sum up to {whole:g}"
            yield Problem(f"data.blend.{index}.weight", source.weight, rule, "leave the source out")


def check_export(export: ExportConfig) -> Problems:
    """Extract must have something to write, one way to check it, and what engines read; what FP8 leaves is bf16."""
    gguf = export.format == "gguf"
    if not export.hugging_face and not export.megatron and not gguf:
        rule = "export.hugging_face and export.megatron must not both be false"
        yield Problem("export.hugging_face", False, rule, "nearest legal value is true")
    elif not export.hugging_face and export.format == "fp8":
        rule = "is the format of a Hugging Face folder, and export.hugging_face is false"
        yield Problem("export.format", export.format, rule, "set export.hugging_face=true")
    if export.in_fp8 and export.precision == "fp32":
        rule = "is not what export.format=fp8 leaves beside the matrices"
        yield Problem("export.precision", "fp32", rule, "nearest legal value is bf16")
    for field, given in {"check": export.check, "gguf_types": export.gguf_types}.items():
        if len(set(given)) < len(given):
            yield Problem(
                f"export.{field}", list(given), "names one twice", f"write [{', '.join(dict.fromkeys(given))}]"
            )
    if len(set(export.own_checks)) > 1:
        rule = f"{' and '.join(export.own_checks)} exclude each other"
        yield Problem("export.check", list(export.check), rule, f"leave {export.own_checks[-1]} out")
    for name in export.engines:
        if export.written_for(name):
            continue
        if name == "llama_cpp":
            rule = "llama_cpp reads GGUF, which is not written"
            yield Problem("export.check", list(export.check), rule, "set export.format=gguf, or leave llama_cpp out")
        else:
            rule = f"{name} is compared on a Hugging Face folder in fp32 or bf16, which is not written"
            yield Problem("export.check", list(export.check), rule, f"leave {name} out")


def check_source(
    init_from: inputs.ServedInput, folder: str | None, budget: str | None, think: str | None, answer: str | None
) -> Problems:
    """Weights come from one place, and a Hugging Face folder is one model without budgets."""
    yield from check_place(init_from, folder)
    for name, value in {"budget": budget, "think": think, "answer": answer}.items():
        if folder is not None and value is not None:
            rule = "names a part of a nested checkpoint, and folder holds one model"
            yield Problem(name, value, rule, f"set {name}=null or give init_from.checkpoint")


def check_place(init_from: inputs.ServedInput, folder: str | None) -> Problems:
    """Weights are a checkpoint's or a Hugging Face folder's, which no router chooses in."""
    if (init_from.checkpoint is None) == (folder is None):
        rule = "exactly one of init_from.checkpoint and folder must be given"
        remedy = "set init_from.checkpoint=RUN or folder=FOLDER" if folder is None else "set folder=null"
        yield Problem("init_from.checkpoint", init_from.checkpoint, rule, remedy)
    if folder is not None and init_from.router is not None:
        rule = "chooses inside a nested checkpoint, and folder holds one model"
        yield Problem("init_from.router", init_from.router, rule, "set init_from.router=null")


def check_writers(budget: str | None, think: str | None, answer: str | None, subnets: Subnets) -> Problems:
    """One budget writes, or two take turns; every subnet given by hand has a use."""
    yield from unique_names("subnets", subnets)
    for index, name in enumerate(subnet.name for subnet in subnets):
        if name not in (budget, think, answer):
            remedy = f"set budget={name}, or think or answer"
            yield Problem(f"subnets.{index}.name", name, "is named by none of budget, think and answer", remedy)
    if (think is None) != (answer is None):
        missing, given = ("answer", think) if answer is None else ("think", answer)
        yield Problem(missing, None, "think and answer go together", f"set {missing}=NAME, or budget={given} alone")
    if budget is not None and (think or answer):
        yield Problem("budget", budget, "contradicts think and answer", "set budget=null")


def check_prompts(prompts: tuple[str, ...], prompt_file: str | None, chat_file: str | None) -> Problems:
    """There is something to go on from."""
    if not prompts and prompt_file is None and chat_file is None:
        remedy = "set prompts='[\"def f(\"]', prompt_file=FILE or chat_file=FILE"
        yield Problem("prompts", [], "there is nothing to go on from", remedy)
    for index in (index for index, prompt in enumerate(prompts) if not prompt):
        yield Problem(f"prompts.{index}", "", "must not be empty", "give a text to go on from")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> Problems:
    """What narrows a draw needs one."""
    for name, value in {"top_k": top_k, "top_p": top_p}.items():
        if value is not None and temperature == 0:
            rule = "narrows a draw, and temperature = 0 takes the most likely token"
            yield Problem(name, value, rule, f"set temperature=1.0 or {name}=null")


def check_ranks(parallel: sections.ParallelConfig, cluster: Cluster) -> Problems:
    """One copy of the model, split over tensor-parallel ranks only: single tokens cannot be shared out."""
    for name, value in {"pipeline": parallel.pipeline, "context": parallel.context}.items():
        if value > 1:
            rule = "text is written token by token, which cannot be split this way"
            yield Problem(f"parallel.{name}", value, rule, "nearest legal value is 1; split with parallel.tensor")
    if parallel.sequence:
        rule = "text is written token by token, which cannot be split over ranks"
        yield Problem("parallel.sequence", True, rule, "nearest legal value is false")
    if cluster.num_processes % parallel.model_size == 0 and cluster.num_processes > parallel.model_size:
        rule = f"must be the number of processes = {cluster.num_processes}: there is one copy of the model"
        remedy = f"start {parallel.tensor} process{'es' if parallel.tensor > 1 else ''} or set parallel.tensor"
        yield Problem("parallel.tensor", parallel.tensor, rule, remedy)


@dataclass(frozen=True)
class Rule:
    """One rule: the verbs it applies to, its problems, and whether later rules on those sections need it to hold.

    The parameters of `check` name the sections it reads; beside them it may take the `cluster`, the whole `config`, and
    the permuted parent's `depth_ranking`, empty where none is known.
    One that reads a training run's `parallel`, but not its phases, is applied to every layout the phases have.
    """

    verbs: type | tuple[type, ...]
    check: Callable[..., Problems]
    later_rules_need_it: bool = False

    @cached_property
    def sections(self) -> frozenset[str]:
        """Return the names of what the rule reads."""
        return frozenset(signature(self.check).parameters)

    def problems(self, config: Any, cluster: Cluster, depth_ranking: tuple[int, ...] = ()) -> Problems:
        """Yield what is wrong with `config`, which is of one of the verbs, on `cluster`."""
        each = isinstance(config, verbs.TrainConfig) and "parallel" in self.sections
        for where, one in config.layouts().items() if each and "curriculum" not in self.sections else (("", config),):
            given = vars(one) | {"config": one, "cluster": cluster, "depth_ranking": depth_ranking}
            for problem in self.check(**{name: given[name] for name in self.sections}):
                yield _named(problem, where)


def _named(problem: Problem, where: str) -> Problem:
    """Call a layout's fields by what they are called in the phase that stands at `where`."""

    def named(text: str) -> str:
        return re.sub(r"(?<![\w.-])(?:data\.(?=micro_batch)|(?=parallel\.\w))", where, text) if where else text

    return replace(problem, field=named(problem.field), rule=named(problem.rule), remedy=named(problem.remedy))


PRETRAIN, ELASTIC, FAMILY = verbs.PretrainConfig, verbs.ElasticConfig, verbs.ElasticRunConfig
TRAINING = (PRETRAIN, ELASTIC)
EVALUATE, GENERATE, TASKS = verbs.EvaluateConfig, verbs.GenerateConfig, EvaluateTasksConfig
HELD_OUT = verbs.HeldOutConfig
COMPUTED = (*TRAINING, verbs.ImportanceConfig, HELD_OUT, GENERATE, TASKS)
# CostConfig describes a run it does not start: only rules of the model, the space and the budgets concern it.
RULES = (
    Rule(COMPUTED, rules_layout.check_world),
    Rule((verbs.ImportConfig, verbs.ExtractConfig), rules_layout.check_one_process),
    Rule(latency.LatencyConfig, latency.check_alone),
    Rule((*TRAINING, verbs.CostConfig), rules_layout.check_model, later_rules_need_it=True),
    Rule(PRETRAIN, lambda model, parallel: model_layout_problems(model, parallel, None)),
    Rule(ELASTIC, lambda model, elastic, parallel: model_layout_problems(model, parallel, elastic.space.lanes)),
    Rule((*TRAINING, verbs.ImportanceConfig, HELD_OUT), check_data),
    Rule((*TRAINING, HELD_OUT), rules_layout.check_validation),
    Rule(HELD_OUT, lambda sequence_length, parallel: sequence_problems("sequence_length", sequence_length, parallel)),
    Rule(verbs.ImportanceConfig, rules_layout.check_importance),
    Rule(TRAINING, rules_layout.check_optimizer),
    Rule(COMPUTED, rules_layout.check_kernels),
    Rule((*TRAINING, verbs.ImportanceConfig, HELD_OUT), rules_layout.check_context_kernels),
    Rule(TRAINING, rules_layout.check_exp_manager),
    Rule(TRAINING, rules_layout.check_timeouts),
    Rule(TRAINING, rules_elastic.check_phases),
    Rule(TRAINING, rules_elastic.check_phase_batches),
    Rule(TRAINING, rules_elastic.check_blend_weights),
    Rule(ELASTIC, rules_elastic.check_draws),
    Rule(TRAINING, rules_elastic.check_max_steps),
    Rule(ELASTIC, rules_elastic.check_elastic_phases),
    Rule(FAMILY, rules_elastic.check_budget_fields),
    Rule(FAMILY, rules_elastic.check_space, later_rules_need_it=True),
    Rule(ELASTIC, rules_elastic.check_choice),
    Rule(ELASTIC, rules_elastic.check_context_choices),
    Rule(FAMILY, latency.check_latency, later_rules_need_it=True),
    Rule(FAMILY, latency.check_floors, later_rules_need_it=True),
    Rule(FAMILY, rules_elastic.check_budgets),
    Rule(ELASTIC, rules_elastic.check_distill),
    Rule(ELASTIC, lambda distill, cluster: fp8_problems("distill.", distill.teacher_precision, cluster)),
    Rule(EVALUATE, check_buckets),
    Rule(EVALUATE, lambda teacher_precision, cluster: fp8_problems("", teacher_precision, cluster)),
    Rule(ELASTIC, rules_elastic.check_fp8_sizes),
    Rule((verbs.MembersConfig, TASKS), check_subnets),
    Rule(verbs.SearchConfig, check_numbers),
    Rule(FAMILY, check_starts),
    Rule(verbs.ExtractConfig, check_export),
    Rule(GENERATE, check_source),
    Rule(GENERATE, check_writers),
    Rule(GENERATE, check_prompts),
    Rule(GENERATE, check_sampling),
    Rule((GENERATE, TASKS), check_ranks),
    Rule(TASKS, check_place),
    Rule(TASKS, check_tasks_source),
    Rule(TASKS, check_tasks_package),
)


def rule_problems(
    config: Any, cluster: Cluster, unreliable: frozenset[str] = frozenset(), depth_ranking: tuple[int, ...] = ()
) -> tuple[Problem, ...]:
    """Apply every rule whose verb is `config`'s, leaving out rules that read a section in `unreliable`."""
    found: list[Problem] = []
    for rule in RULES:
        if isinstance(config, rule.verbs) and not unreliable & rule.sections:
            problems = tuple(rule.problems(config, cluster, depth_ranking))
            found.extend(problems)
            if rule.later_rules_need_it:
                unreliable |= {problem.section for problem in problems}
    return tuple(found)
