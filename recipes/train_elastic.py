"""Train the family from a permuted parent: `python recipes/train_elastic.py key=value ...`, conf/train_elastic.yaml."""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.training import ElasticConfig
from elastic.verbs.training import run_elastic
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="train_elastic")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    run_elastic(load_config(cfg, ElasticConfig), Console())


if __name__ == "__main__":
    run(main)
