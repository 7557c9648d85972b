"""A family that trains in seconds, for recipes that try out the machinery: corpus, parent, permuted parent, values."""

import random
from pathlib import Path
from typing import Any

from rich.console import Console

from elastic.config.load import load
from elastic.config.verbs import ElasticConfig, ImportanceConfig, PretrainConfig
from elastic.corpus.config import PrepareConfig
from elastic.corpus.prepare import prepare
from elastic.verbs.estimate_importance import run_importance
from elastic.verbs.training import run_training
from elastic.world.agent import end_with_agent

MODEL = dict(
    pattern="M-*-", vocab=320, hidden=32, ffn=64, mamba_heads=4, head_channels=8, mamba_groups=2,
    mamba_state=16, attention_heads=4, kv_heads=2, attention_channels=16,
)  # fmt: skip
SPACE = dict(lanes=8, hidden=dict(choices=[32, 24]), ffn=dict(choices=[64, 32], per_layer=True),
             mamba_head=dict(choices=[4, 2]), depth=dict(choices=[4, 3]))  # fmt: skip
BUDGETS = [dict(name="full", ratio=1.0), dict(name="half", ratio=0.7)]
WORDS = ("the", "small", "large", "model", "layer", "head", "learns", "forgets", "keeps", "width", "of", "and")


def prepare_tiny_family(folder: Path) -> None:
    """Write a made-up corpus, its prepared data, a parent and its permuted copy under `folder`."""
    draw = random.Random(7)
    (folder / "corpus").mkdir(parents=True)
    for number in range(40):
        (folder / "corpus" / f"{number:02d}.txt").write_text(" ".join(draw.choices(WORDS, k=150)) + "\n")
    prepare_corpus(folder)
    quiet = Console(quiet=True)
    phase = dict(name="pretrain", sequence_length=16, global_batch=4, steps=2, lr=dict(peak=3e-3))
    parent = dict(model=MODEL, data=_data(folder), curriculum=[phase], exp_manager=_place(folder, "parent"))
    run_training(load(PretrainConfig, parent), quiet)
    importance = dict(num_sequences=4, sequence_length=16, micro_batch=4, depth="one_shot", depth_sequences=4)
    permuted = dict(
        init_from=dict(parent=f"{folder}/run/parent"), data=dict(path=f"{folder}/data"), importance=importance,
        exp_manager=_place(folder, "permuted"),
    )  # fmt: skip
    run_importance(load(ImportanceConfig, permuted), quiet)


def prepare_corpus(folder: Path) -> None:
    """Prepare the texts in folder/corpus as folder/data, with a small tokenizer of their own."""
    prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            paths=[str(folder / "corpus")],
            suffixes=[".txt"],
            vocab_size=300,
            validation_ratio=0.2,
        )
    )


def tiny_family_values(folder: Path, version: str) -> dict[str, Any]:
    """Return the config of a run of 14 steps in two phases, a checkpoint every 2 steps, every step logged."""
    phase = dict(sequence_length=16, global_batch=4, lr=dict(peak=1e-3), router_lr=dict(peak=1e-2))
    return dict(
        model=MODEL,
        data=_data(folder),
        init_from=dict(permuted_parent=f"{folder}/run/permuted"),
        elastic=dict(space=SPACE, budgets=BUDGETS, router=dict(hidden_width=16)),
        curriculum=[
            dict(phase, name="first", steps=7),
            dict(phase, name="second", steps=7, sequence_length=32, router_frozen=True, execution="slice"),
        ],
        trainer=dict(
            log_every_n_steps=1,
            val_check_interval=5,
            checkpoint_every_n_steps=2,
            collective_timeout_s=30,
            watchdog_timeout_s=20,
        ),
        exp_manager=_place(folder, version),
    )


def train_tiny_family(values: dict[str, Any]) -> None:
    """Run the main job in the calling process, one of torchrun's workers or alone, and say nothing."""
    end_with_agent()
    run_training(load(ElasticConfig, values), Console(quiet=True))


def _data(folder: Path) -> dict[str, Any]:
    return dict(path=f"{folder}/data", micro_batch=1, validation_sequences=4)


def _place(folder: Path, version: str) -> dict[str, Any]:
    return dict(exp_dir=str(folder), name="run", version=version)
