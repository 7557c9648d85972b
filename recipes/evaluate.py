"""Report deterministic loss and cost per budget: `python recipes/evaluate.py key=value ...`, conf/evaluate.yaml."""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.serving import EvaluateConfig
from elastic.verbs.evaluate import run_evaluate
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    run_evaluate(load_config(cfg, EvaluateConfig), Console())


if __name__ == "__main__":
    run(main)
