"""Prepare text for training: tokenizer and indexed train / validation sets.

`python recipes/prepare_data.py key=value ...`, conf/prepare_data.yaml.
"""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.train.prepare import prepare
from elastic.train.prepare_config import PrepareConfig
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    prepared = prepare(load_config(cfg, PrepareConfig))
    splits = ", ".join(f"{name} {split.num_tokens:,} tokens" for name, split in prepared.manifest.splits.items())
    state = "already prepared" if prepared.already_prepared else "prepared"
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in prepared.manifest.skipped.items()) or "nothing"
    console = Console(soft_wrap=True)
    console.print(f"{prepared.folder}: {state}, {prepared.manifest.num_documents:,} documents, {splits}")
    console.print(f"skipped: {skipped}")


if __name__ == "__main__":
    run(main)
