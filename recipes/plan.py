"""Print what a run of the main job needs of a cluster: memory, work, traffic, time, price; rank layouts.

`python recipes/plan.py cluster.num_gpus=256 key=value ...`, or `--config-name RUN +cluster=h200` for any config of
recipes/train_elastic.py. Reads no data and no weights; plan.dry_run=true also traces the model's own code on tensors
without memory, as one rank of that cluster.
"""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.plan.config import PlanConfig
from elastic.plan.run_plan import run_plan
from recipes._common import load_config, run

MIN_COLUMNS = 118  # what the tables take; a narrower terminal, or a job's log, wraps instead of losing digits


@hydra_runner(config_path="../conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    """Check the config and print."""
    run_plan(load_config(cfg, PlanConfig), Console(width=max(MIN_COLUMNS, Console().width)))


if __name__ == "__main__":
    run(main)
