"""Prepare text for training: tokenizer and indexed train / validation sets.

`python recipes/prepare_data.py key=value ...`, conf/prepare_data.yaml.
"""

from recipes._nemo import hydra_runner  # isort: skip (first, it holds back what NeMo and Megatron print on import)

from omegaconf import DictConfig
from rich.console import Console

from elastic.data.prepare import prepare, skip_lines
from elastic.data.prepare_config import PrepareConfig
from recipes._common import load_config, run


@hydra_runner(config_path="../conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    """Check the config and run."""
    prepared = prepare(load_config(cfg, PrepareConfig))
    splits = ", ".join(f"{name} {split.num_tokens:,} tokens" for name, split in prepared.manifest.splits.items())
    state = "already prepared" if prepared.already_prepared else "prepared"
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(f"{prepared.folder}: {state}, {prepared.manifest.num_documents:,} documents, {splits}")
    manifest = prepared.manifest
    if manifest.tokenizer.bos_ids:
        console.print(f"every document begins with the tokenizer's own {list(manifest.tokenizer.bos_ids)}")
    if manifest.stopped_at_max_bytes:
        console.print(f"stopped at max_bytes = {manifest.settings['max_bytes']:,}: there are more documents")
    for line in skip_lines(prepared.manifest.skipped) or ["nothing"]:
        console.print(f"skipped: {line}")


if __name__ == "__main__":
    run(main)
