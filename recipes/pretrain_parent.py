"""Train a parent from scratch: `python recipes/pretrain_parent.py key=value ...`, conf/pretrain_parent.yaml."""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.training import PretrainConfig
from elastic.verbs.training import run_pretrain
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="pretrain_parent")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    run_pretrain(load_config(cfg, PretrainConfig), Console())


if __name__ == "__main__":
    run(main)
