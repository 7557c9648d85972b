"""Cut budgets out of a nested checkpoint into Hugging Face folders.

`python recipes/extract.py key=value ...`, conf/extract.yaml.
"""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.serving import ExtractConfig
from elastic.verbs.extract import run_extract
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="extract")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    run_extract(load_config(cfg, ExtractConfig), Console())


if __name__ == "__main__":
    run(main)
