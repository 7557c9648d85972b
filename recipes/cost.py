"""Print what a run of the main job can reach and what it costs.

`python recipes/cost.py --config-name elastic_12b key=value ...`, any config of recipes/train_elastic.py. Reads no data
and no weights, and starts no process group.
"""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.config.training import CostConfig
from elastic.verbs.cost import run_cost
from recipes._common import load_config, run

MIN_COLUMNS = 100  # what the tables take; a narrower terminal, or a job's log, wraps instead of losing digits


@hydra_runner(config_path="../conf", config_name="elastic_12b")
def main(cfg: DictConfig) -> None:
    """Check the config and print."""
    run_cost(load_config(cfg, CostConfig), Console(width=max(MIN_COLUMNS, Console().width)))


if __name__ == "__main__":
    run(main)
