"""Turn a stock nemotron_h folder into a Megatron-Core checkpoint.

`python recipes/import_hf.py key=value ...`, conf/import_hf.yaml.
"""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.serving import ImportConfig
from elastic.verbs.import_hf import run_import
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="import_hf")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    run_import(load_config(cfg, ImportConfig), Console())


if __name__ == "__main__":
    run(main)
