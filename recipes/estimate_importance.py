"""Score a parent and write the permuted (nested) parent.

`python recipes/estimate_importance.py key=value ...`, conf/estimate_importance.yaml.
"""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.training import ImportanceConfig
from elastic.verbs.estimate_importance import run_importance
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="estimate_importance")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    run_importance(load_config(cfg, ImportanceConfig), Console())


if __name__ == "__main__":
    run(main)
