"""The table of rules between fields, and the checks a recipe runs before any process group starts.

A rule runs only when the sections it reads loaded without a problem of their own, so one mistake is reported once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.config import rules_elastic as elastic_rules
from elastic.config import rules_generate as generate_rules
from elastic.config import rules_layout as layout_rules
from elastic.config.load import ConfigError, Problem, load_with_problems
from elastic.config.rules_layout import Cluster
from elastic.config.serving import EvaluateConfig, ExtractConfig, GenerateConfig, ImportConfig, MembersConfig
from elastic.config.training import (
    ComputedConfig,
    CostConfig,
    ElasticConfig,
    ElasticRunConfig,
    ImportanceConfig,
    PretrainConfig,
)


@dataclass(frozen=True)
class Rule:
    """One rule: the verbs it applies to, the sections it reads, and whether later rules on those need it to hold."""

    verbs: type | tuple[type, ...]
    sections: tuple[str, ...]
    problems: Callable[[Any, Cluster], Iterator[Problem]]
    later_rules_need_it: bool = False


TRAINING = (PretrainConfig, ElasticConfig)
# CostConfig describes a run it does not start: only rules of the model, the space and the budgets concern it.
RULES = (
    Rule(ComputedConfig, ("parallel",), layout_rules.check_world),
    Rule((ImportConfig, ExtractConfig), (), layout_rules.check_one_process),
    Rule((*TRAINING, CostConfig), ("model",), layout_rules.check_pattern, later_rules_need_it=True),
    Rule((*TRAINING, CostConfig), ("model",), layout_rules.check_sizes, later_rules_need_it=True),
    Rule(PretrainConfig, ("model", "parallel"), layout_rules.check_layout),
    Rule(ElasticConfig, ("model", "elastic", "parallel"), layout_rules.check_layout),
    Rule((*TRAINING, EvaluateConfig), ("data", "parallel"), layout_rules.check_validation),
    Rule(EvaluateConfig, ("sequence_length", "parallel"), layout_rules.check_evaluation_length),
    Rule(ImportanceConfig, ("importance", "parallel"), layout_rules.check_importance),
    Rule(TRAINING, ("optim",), layout_rules.check_optimizer),
    Rule(TRAINING, ("exp_manager", "trainer"), layout_rules.check_exp_manager),
    Rule(TRAINING, ("trainer",), layout_rules.check_timeouts),
    Rule(TRAINING, ("curriculum", "parallel"), elastic_rules.check_phases),
    Rule(TRAINING, ("curriculum", "data", "parallel"), elastic_rules.check_phase_batches),
    Rule(ElasticConfig, ("curriculum", "elastic", "data", "parallel"), elastic_rules.check_draws),
    Rule(ElasticConfig, ("curriculum", "elastic", "data", "parallel"), elastic_rules.check_noise_draws),
    Rule(TRAINING, ("curriculum", "trainer"), elastic_rules.check_max_steps),
    Rule(ElasticConfig, ("curriculum", "elastic", "optim"), elastic_rules.check_elastic_phases),
    Rule(ElasticRunConfig, ("elastic",), elastic_rules.check_budget_fields),
    Rule(ElasticRunConfig, ("model", "elastic"), elastic_rules.check_space, later_rules_need_it=True),
    Rule(ElasticConfig, ("model", "elastic"), elastic_rules.check_choice),
    Rule(ElasticConfig, ("model", "elastic", "parallel"), elastic_rules.check_context_choices),
    Rule(ElasticRunConfig, ("model", "elastic"), elastic_rules.check_budgets),
    Rule(ElasticConfig, ("distill",), elastic_rules.check_distill),
    Rule(ElasticConfig, ("distill", "curriculum", "data", "parallel"), elastic_rules.check_num_chunks),
    Rule(MembersConfig, ("budget_names", "subnets"), elastic_rules.check_subnets),
    Rule(ExtractConfig, ("export",), elastic_rules.check_export),
    Rule(GenerateConfig, ("init_from", "folder", "budget", "think", "answer"), generate_rules.check_source),
    Rule(GenerateConfig, ("budget", "think", "answer", "subnets"), generate_rules.check_writers),
    Rule(GenerateConfig, ("prompts", "prompt_file"), generate_rules.check_prompts),
    Rule(GenerateConfig, ("temperature", "top_k", "top_p"), generate_rules.check_sampling),
    Rule(GenerateConfig, ("parallel",), generate_rules.check_ranks),
)


def rule_problems(config: Any, cluster: Cluster, unreliable: frozenset[str] = frozenset()) -> tuple[Problem, ...]:
    """Apply every rule whose verb is `config`'s, leaving out rules that read a section in `unreliable`."""
    found: list[Problem] = []
    for rule in RULES:
        if not isinstance(config, rule.verbs) or unreliable.intersection(rule.sections):
            continue
        problems = tuple(rule.problems(config, cluster))
        found.extend(problems)
        if rule.later_rules_need_it:
            unreliable |= {problem.section for problem in problems}
    return tuple(found)


def check(config: Any, cluster: Cluster) -> None:
    """Raise ConfigError listing every rule between fields that `config` breaks on `cluster`."""
    problems = rule_problems(config, cluster)
    if problems:
        raise ConfigError(problems)


def load_and_check[T](kind: type[T], values: Mapping[str, Any], cluster: Cluster) -> T:
    """Build `kind` from plain values and check it; raises one ConfigError for both."""
    config, problems = load_with_problems(kind, values)
    unreliable = frozenset(problem.section for problem in problems)
    problems += rule_problems(config, cluster, unreliable)
    if problems:
        raise ConfigError(problems)
    return config
