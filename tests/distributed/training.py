"""Tiny training runs for tests: a made-up corpus, a parent, its permuted copy, and the family, on any layout."""

import json
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import distrib_optimizer
from rich.console import Console

from elastic.config.load import load
from elastic.config.sections import ModelConfig, SpaceConfig
from elastic.config.verbs import ElasticConfig, EvaluateConfig, ImportanceConfig, PretrainConfig
from elastic.space.space import Space
from elastic.verbs.estimate_importance import run_importance
from elastic.verbs.evaluate import run_evaluate
from elastic.verbs.training import run_training
from recipes._tiny_family import prepare_corpus
from tests.distributed.harness import run_distributed

MODEL = dict(
    pattern="M-M*-", vocab=320, hidden=64, ffn=128, mamba_heads=8, head_channels=8, mamba_groups=4,
    mamba_state=16, attention_heads=8, kv_heads=4, attention_channels=16,
)  # fmt: skip
SPACE = dict(
    lanes=8,
    hidden=dict(choices=[64, 48, 32]),
    ffn=dict(choices=[128, 96, 64, 32], per_layer=True),
    mamba_head=dict(choices=[8, 4]),
    mamba_channel=dict(choices=[8, 6]),
    attention_head=dict(choices=[8, 4]),
    depth=dict(choices=[5, 4, 3]),
)
BUDGETS = [dict(name="full", ratio=1.0), dict(name="half", ratio=0.6)]
CURRICULUM = [
    dict(name="short", sequence_length=32, global_batch=8, steps=5, lr=dict(peak=1e-3), router_lr=dict(peak=1e-2)),
    dict(
        name="long", sequence_length=64, global_batch=8, steps=4, lr=dict(peak=5e-4), router_lr=dict(peak=0.0),
        budget_weights=dict(full=0.25, half=0.75), router_frozen=True, execution="slice",
    ),
]  # fmt: skip
# Four draws of a micro-batch of two sequences, or of two of one: the same budgets and noise with any replicas.
DRAWS_PER_STEP = 4
ROUTER = dict(draws_per_step=DRAWS_PER_STEP, hidden_width=16)
# Of elastic_values, with noise of its own for every draw: gates that do not depend on the micro-batch.
SPLIT_ELASTIC = dict(space=SPACE, budgets=BUDGETS, router=dict(ROUTER, noise_draws_per_step=DRAWS_PER_STEP))


def write_corpus(folder: Path) -> None:
    """Write documents of made-up sentences, the same on every machine."""
    words = ["the", "small", "large", "model", "layer", "head", "learns", "forgets", "keeps", "width", "of", "and"]
    generator = torch.Generator().manual_seed(7)
    folder.mkdir(parents=True)
    for number in range(60):
        picks = torch.randint(len(words), (200,), generator=generator).tolist()
        (folder / f"{number:02d}.txt").write_text(" ".join(words[pick] for pick in picks) + "\n")


def place(folder: Path, version: str) -> dict[str, Any]:
    """Return the exp_manager section of a run."""
    return dict(exp_dir=str(folder), name="run", version=version)


def prepare_start(folder: Path) -> None:
    """Make data, parent and permuted parent under `folder`; runs on one process."""
    write_corpus(folder / "corpus")
    prepare_corpus(folder)
    train_start(folder)


def train_start(folder: Path, model: dict[str, Any] = MODEL, steps: int = 20) -> None:
    """Make parent and permuted parent from the prepared data in folder/data; runs on one process."""
    data = dict(path=str(folder / "data"), micro_batch=1, validation_sequences=4)
    trainer = dict(log_every_n_steps=5, val_check_interval=100, checkpoint_every_n_steps=100)
    pretrain = dict(
        model=model, data=data, trainer=trainer, exp_manager=place(folder, "parent"),
        curriculum=[dict(name="pretrain", sequence_length=32, global_batch=8, steps=steps, lr=dict(peak=3e-3))],
    )  # fmt: skip
    run_training(load(PretrainConfig, pretrain), Console(quiet=True))
    importance = dict(
        init_from=dict(parent=str(folder / "run" / "parent")), data=dict(path=str(folder / "data")), lanes=8,
        importance=dict(
            method="activations", depth="one_shot", depth_sequences=4,
            num_sequences=8, sequence_length=32, micro_batch=4,
        ),
        exp_manager=place(folder, "permuted"),
    )  # fmt: skip
    run_importance(load(ImportanceConfig, importance), Console(quiet=True))


def elastic_values(folder: Path, version: str, **overrides: Any) -> dict[str, Any]:
    """Return the values of a tiny elastic run; `overrides` replace or extend whole sections."""
    sections: dict[str, Any] = dict(
        model=MODEL,
        data=dict(path=str(folder / "data"), micro_batch=2, validation_sequences=4),
        init_from=dict(permuted_parent=str(folder / "run" / "permuted")),
        elastic=dict(space=SPACE, budgets=BUDGETS, router=ROUTER),
        curriculum=CURRICULUM,
        trainer=dict(log_every_n_steps=1, val_check_interval=100, checkpoint_every_n_steps=3),
        exp_manager=place(folder, version),
    )
    for name, values in overrides.items():
        sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
    return sections


def split_values(folder: Path, version: str, **overrides: Any) -> dict[str, Any]:
    """Return values whose gates do not depend on the micro-batch; the first phase gives its length in tokens."""
    curriculum = [dict(CURRICULUM[0], steps=None, tokens=5 * 8 * 32), CURRICULUM[1]]
    return elastic_values(folder, version, **{"elastic": SPLIT_ELASTIC, "curriculum": curriculum, **overrides})


def tiny_run_space() -> Space:
    """Return the space of the tiny runs, layers in their own order."""
    return load(SpaceConfig, SPACE).space(load(ModelConfig, MODEL).shape())


def train(values: dict[str, Any]) -> None:
    """Run the main job in the calling process, rank or not."""
    run_training(load(ElasticConfig, values), Console(quiet=True))


def evaluate(
    start: Path, version: str, checkpoint: Path, processes: int = 1, data: str = "data", split: str = "validation",
    **more: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Evaluate members and return their rows by name."""
    values = dict(
        init_from=dict(checkpoint=str(checkpoint), **more.pop("init_from", {})),
        data=dict(path=str(start / data), micro_batch=2, validation_sequences=7, split=split),
        sequence_length=32,
        exp_manager=place(start, version),
        **more,
    )
    run_distributed(_evaluate, processes, values)
    written = json.loads((start / "run" / version / "evaluation.json").read_text())
    assert written["split"] == split
    return {row["name"]: row for row in written["members"]}


def _evaluate(values: dict[str, Any]) -> None:
    run_evaluate(load(EvaluateConfig, values), Console(quiet=True))


class GroupAdam(torch.optim.Optimizer):
    """AdamW with the interface of the fused ones: moments in fp32, one step count for a group."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: Any,
        eps: float,
        adam_w_mode: bool,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(moment, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))


def train_fused(values: dict[str, Any]) -> None:
    """Train as on a machine whose Adam is fused, as the distributed optimizer needs it.

    On the CPU its own torch AdamW cannot be resumed (upstream), so the config refuses it there.
    """
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(megatron, "USING_PYTORCH_OPTIMIZER", False))
        patches.enter_context(mock.patch.object(megatron, "Adam", GroupAdam, create=True))
        patches.enter_context(mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True))
        patches.enter_context(mock.patch.object(distrib_optimizer, "USING_APEX_OPTIMIZER", True))
        train(values)


def train_and_be_killed(values: dict[str, Any], checkpoint: str, after_row: int) -> None:
    """Train, and SIGKILL this process once `checkpoint` is whole and a later row has been logged."""
    _train_and_receive(values, signal.SIGKILL, after_row, checkpoint)


def train_and_be_told_to_stop(values: dict[str, Any], after_row: int) -> None:
    """Train, and send this process SIGUSR1 once a row has been logged; returns when the run has ended in order."""
    _train_and_receive(values, signal.SIGUSR1, after_row, None)


def _train_and_receive(values: dict[str, Any], number: signal.Signals, after_row: int, checkpoint: str | None) -> None:
    manager = values["exp_manager"]
    folder = Path(manager["exp_dir"]) / manager["name"] / manager["version"]

    def watch() -> None:
        while True:
            logged = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
            saved = checkpoint is None or (folder / "checkpoints" / checkpoint).exists()
            if saved and f'"step": {after_row},' in logged:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    train(values)


def rows(folder: Path, version: str) -> dict[int, dict[str, float]]:
    """Return the logged rows by step, the last one where a step was logged twice, without wall-clock values."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "run" / version / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {
            name: value
            for name, value in row.items()
            if name not in ("step", "tokens_per_s", "phase") and not name.startswith("checkpoint/")
        }
        found.setdefault(row["step"], {}).update(kept)
    return found
