"""The table of verbs: the config each takes, and the body that does its work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic.config.latency import LatencyConfig
from elastic.config.tasks import EvaluateTasksConfig
from elastic.config.verbs import (
    CostConfig,
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    GenerateConfig,
    ImportanceConfig,
    ImportConfig,
    PretrainConfig,
    SearchConfig,
)
from elastic.corpus.config import PrepareConfig
from elastic.plan.config import PlanConfig
from elastic.plan.run_plan import run_plan
from elastic.verbs.cost import run_cost
from elastic.verbs.estimate_importance import run_importance
from elastic.verbs.evaluate import run_evaluate
from elastic.verbs.evaluate_tasks import run_evaluate_tasks
from elastic.verbs.extract import run_extract
from elastic.verbs.generate import run_generate
from elastic.verbs.import_hf import run_import
from elastic.verbs.measure_latency import run_measure_latency
from elastic.verbs.prepare_data import run_prepare
from elastic.verbs.search import run_search
from elastic.verbs.training import run_training


@dataclass(frozen=True)
class Verb:
    """A verb: called with a checked `config` and the console to speak to; `run_name` is the file of conf/ it takes."""

    config: type
    body: Callable[..., Any]
    run_name: str | None = None


VERBS = {
    "prepare_data": Verb(PrepareConfig, run_prepare),
    "pretrain_parent": Verb(PretrainConfig, run_training),
    "import_hf": Verb(ImportConfig, run_import),
    "estimate_importance": Verb(ImportanceConfig, run_importance),
    "cost": Verb(CostConfig, run_cost, "elastic_12b"),
    "measure_latency": Verb(LatencyConfig, run_measure_latency, "elastic_12b"),
    "plan": Verb(PlanConfig, run_plan),
    "train_elastic": Verb(ElasticConfig, run_training),
    "evaluate": Verb(EvaluateConfig, run_evaluate),
    "search": Verb(SearchConfig, run_search),
    "evaluate_tasks": Verb(EvaluateTasksConfig, run_evaluate_tasks),
    "extract": Verb(ExtractConfig, run_extract),
    "generate": Verb(GenerateConfig, run_generate),
}
