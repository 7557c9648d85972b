"""Ask lm-eval for the scores of one model after another."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from elastic.config.tasks import EvaluateTasksConfig
from elastic.hf.export_settings import HfSettings
from elastic.model.model import ElasticModel
from elastic.space.shape import Subnet
from elastic.tasks.language_model import Limits, NestedLM

_NO_SCORES = ("alias", "name", "sample_len", "sample_count")


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """Return lm-eval's table of tasks: of `include_path` alone where that has all of them, which is found sooner."""
    own = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
    return own if own is not None and set(tasks) <= set(own.all_tasks) else TaskManager(include_path=include_path)


def what_is_wrong(name: str, manager: Any, config: EvaluateTasksConfig) -> str | None:
    """Build a task and its first question; returns what stands in the way: missing data, a broken template."""
    try:
        for task in manager.load([name])["tasks"].values():
            if config.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=config.num_fewshot)
            task.set_fewshot_seed(seed=config.seed)
            task.build_all_requests(limit=1)
    except Exception as error:  # a task is somebody's YAML, template and code: anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


class Evaluator:
    """The tasks of one config, asked alike of every model."""

    def __init__(self, config: EvaluateTasksConfig, manager: Any) -> None:
        self.config, self.manager = config, manager
        self.higher_is_better: dict[str, dict[str, bool]] = {}
        logging.getLogger("lm_eval").setLevel(logging.WARNING)

    def nested(self, model: ElasticModel, subnet: Subnet, tokenizer: Path, settings: HfSettings) -> dict[str, Any]:
        """Return the scores of a subnet; what its export would say are `settings`."""
        text = AutoTokenizer.from_pretrained(str(tokenizer))
        limits = Limits(
            max_length=self.config.max_length or settings.max_position_embeddings,
            batch_size=self.config.batch_size,
            eos_ids=settings.end_tokens() or frozenset((text.eos_token_id,)),
            suppressed=tuple((settings.generation or {}).get("suppress_tokens") or ()),
            seed=self.config.seed,
        )
        return self._scores(NestedLM(model, subnet, text, limits))

    def exported(self, folder: Path, device: torch.device) -> dict[str, Any]:
        """Return the scores that lm-eval's own `hf` finds of an exported folder, in the folder's number format."""
        given = {"max_length": self.config.max_length, "tokenizer": self.config.tokenizer}
        arguments = {"pretrained": str(folder), "dtype": "auto"}
        return self._scores("hf", arguments | {name: value for name, value in given.items() if value}, str(device))

    def _scores(self, model: Any, arguments: dict[str, Any] | None = None, device: str | None = None) -> dict[str, Any]:
        config, seed = self.config, self.config.seed
        found = simple_evaluate(
            model,
            model_args=arguments,
            device=device,
            tasks=list(config.tasks),
            task_manager=self.manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            batch_size=config.batch_size,
            apply_chat_template=config.chat_template,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        if found is None:  # lm-eval answers on the first process of a node; the tensor-parallel others have computed
            return {}
        self.higher_is_better |= found["higher_is_better"]
        scores = {
            task: {name: value for name, value in metrics.items() if name not in _NO_SCORES}
            for task, metrics in found["results"].items()
        }
        return {task: metrics for task, metrics in scores.items() if metrics}  # a group may have none of its own
