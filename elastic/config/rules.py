"""The table of rules between fields, which a recipe checks before any process group starts.

A rule runs only when the sections it reads loaded without a problem of their own, so one mistake is reported once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

from elastic.config import rules_elastic, rules_layout, rules_serving
from elastic.config.load import Problem, Problems
from elastic.config.rules_layout import Cluster
from elastic.config.serving import EvaluateConfig, ExtractConfig, GenerateConfig, ImportConfig, MembersConfig
from elastic.config.training import CostConfig, ElasticConfig, ElasticRunConfig, ImportanceConfig, PretrainConfig


@dataclass(frozen=True)
class Rule:
    """One rule: the verbs it applies to, its problems, and whether later rules on those sections need it to hold.

    The parameters of `check` name the sections it reads; beside them it may take the `cluster` and the whole `config`.
    """

    verbs: type | tuple[type, ...]
    check: Callable[..., Problems]
    later_rules_need_it: bool = False

    @cached_property
    def sections(self) -> frozenset[str]:
        """Return the names of what the rule reads."""
        return frozenset(signature(self.check).parameters)

    def problems(self, config: Any, cluster: Cluster) -> Problems:
        """Yield what is wrong with `config`, which is of one of the verbs, on `cluster`."""
        given = vars(config) | {"config": config, "cluster": cluster}
        return self.check(**{name: given[name] for name in self.sections})


TRAINING = (PretrainConfig, ElasticConfig)
COMPUTED = (*TRAINING, ImportanceConfig, EvaluateConfig, GenerateConfig)
# CostConfig describes a run it does not start: only rules of the model, the space and the budgets concern it.
RULES = (
    Rule(COMPUTED, rules_layout.check_world),
    Rule((ImportConfig, ExtractConfig), rules_layout.check_one_process),
    Rule((*TRAINING, CostConfig), rules_layout.check_model, later_rules_need_it=True),
    Rule(PretrainConfig, rules_layout.check_layout),
    Rule(ElasticConfig, rules_layout.check_nested_layout),
    Rule((*TRAINING, EvaluateConfig), rules_layout.check_validation),
    Rule(EvaluateConfig, rules_layout.check_evaluation_length),
    Rule(ImportanceConfig, rules_layout.check_importance),
    Rule(TRAINING, rules_layout.check_optimizer),
    Rule(TRAINING, rules_layout.check_exp_manager),
    Rule(TRAINING, rules_layout.check_timeouts),
    Rule(TRAINING, rules_elastic.check_phases),
    Rule(TRAINING, rules_elastic.check_phase_batches),
    Rule(ElasticConfig, rules_elastic.check_draws),
    Rule(TRAINING, rules_elastic.check_max_steps),
    Rule(ElasticConfig, rules_elastic.check_elastic_phases),
    Rule(ElasticRunConfig, rules_elastic.check_budget_fields),
    Rule(ElasticRunConfig, rules_elastic.check_space, later_rules_need_it=True),
    Rule(ElasticConfig, rules_elastic.check_choice),
    Rule(ElasticConfig, rules_elastic.check_context_choices),
    Rule(ElasticRunConfig, rules_elastic.check_budgets),
    Rule(ElasticConfig, rules_elastic.check_distill),
    Rule(ElasticConfig, rules_elastic.check_num_chunks),
    Rule(MembersConfig, rules_serving.check_subnets),
    Rule(ExtractConfig, rules_serving.check_export),
    Rule(GenerateConfig, rules_serving.check_source),
    Rule(GenerateConfig, rules_serving.check_writers),
    Rule(GenerateConfig, rules_serving.check_prompts),
    Rule(GenerateConfig, rules_serving.check_sampling),
    Rule(GenerateConfig, rules_serving.check_ranks),
)


def rule_problems(config: Any, cluster: Cluster, unreliable: frozenset[str] = frozenset()) -> tuple[Problem, ...]:
    """Apply every rule whose verb is `config`'s, leaving out rules that read a section in `unreliable`."""
    found: list[Problem] = []
    for rule in RULES:
        if not isinstance(config, rule.verbs) or unreliable & rule.sections:
            continue
        problems = tuple(rule.problems(config, cluster))
        found.extend(problems)
        if rule.later_rules_need_it:
            unreliable |= {problem.section for problem in problems}
    return tuple(found)
