"""Write text from any budget of a family: `python recipes/generate.py key=value ...`, conf/generate.yaml."""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.serving import GenerateConfig
from elastic.verbs.generate import run_generate
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    run_generate(load_config(cfg, GenerateConfig), Console())


if __name__ == "__main__":
    run(main)
