"""Checkpoints: Megatron-Core's format for model and optimizer, safetensors for the router, JSON for the rest.

    checkpoints/step_00000100/      written as step_00000100.writing, then renamed: a folder by this name is whole
        *.distcp, metadata.json     model and optimizer, readable at any parallel layout
        router.safetensors          router weights and their Adam state, replicated on every rank
        record.json                 what the model is (record.py)
        state.json                  step, sample counts, seed, resolved config
        hugging_face/               settings and tokenizer of an imported parent, for exports

Every random draw of training is a pure function of (seed, step, micro-batch), so the seed and the step are the state
of sampler, Gumbel noise and data order.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.compress.hf_carried import CARRIED_FOLDER
from elastic.modules.model import ElasticModel
from elastic.train.checkpoint_metadata import CheckpointError
from elastic.train.parallel import World
from elastic.train.record import RECORD_FILE, Record

STATE_FILE, ROUTER_FILE, FOLDER = "state.json", "router.safetensors", "checkpoints"


@dataclass(frozen=True)
class TrainingState:
    """What beside tensors a run needs to go on. `origin` says what it was made from (resume.py)."""

    step: int
    seed: int
    config: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainable:
    """The things with tensors that a training run saves."""

    model: ElasticModel
    optimizer: MegatronOptimizer | None = None
    router: nn.Module | None = None
    router_optimizer: Optimizer | None = None


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run_folder / FOLDER / f"step_{step:08d}"


def writing_folder(folder: Path) -> Path:
    """Return where a checkpoint lies until it is whole."""
    return folder.with_name(folder.name + ".writing")


def list_checkpoints(run_folder: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    return sorted(
        path for path in (run_folder / FOLDER).glob("step_*") if path.suffix == "" and (path / RECORD_FILE).is_file()
    )


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` names: itself, or the newest of a run folder; raises CheckpointError."""
    folder = Path(path)
    if (folder / RECORD_FILE).is_file():
        return folder
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} is neither a checkpoint nor a run folder with one; check the path")
    return found[-1]


def save_checkpoint(
    folder: Path,
    trained: Trainable,
    record: Record,
    state: TrainingState | None,
    world: World,
    carried_from: Path | None = None,
) -> None:
    """Write one checkpoint aside and rename it when every rank has finished; refuses to replace an existing one.

    `carried_from` is the checkpoint whose settings and tokenizer for exports (hf_carried.py) go along, if it has any.
    """
    writing = writing_folder(folder)
    if world.is_main:
        if folder.exists():
            raise CheckpointError(f"{folder} exists already and is not replaced; remove it or choose another folder")
        shutil.rmtree(writing, ignore_errors=True)  # left by a run that was killed while saving
        writing.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_sharded_state(trained, is_loading=False), str(writing))
    if world.is_main:
        record.write(writing)
        if trained.router is not None:
            save_file(_router_tensors(trained.router, trained.router_optimizer), writing / ROUTER_FILE)
        if carried_from is not None and (carried_from / CARRIED_FOLDER).is_dir():
            shutil.copytree(carried_from / CARRIED_FOLDER, writing / CARRIED_FOLDER)
        if state is not None:
            content = {"step": state.step, "seed": state.seed, "config": state.config, "origin": state.origin}
            (writing / STATE_FILE).write_text(json.dumps(content, indent=1, default=str) + "\n")
        writing.rename(folder)
    torch.distributed.barrier()


def load_checkpoint(folder: Path, into: Trainable) -> TrainingState | None:
    """Load whatever `into` holds, strictly, from any parallel layout; returns the training state if there is one."""
    sharded = _sharded_state(into, is_loading=True)
    loaded = dist_checkpointing.load(
        sharded, str(folder), strict="raise_all" if into.optimizer else "assume_ok_unexpected"
    )
    missing, unexpected = into.model.load_state_dict(loaded["model"], strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    if wrong:
        raise CheckpointError(f"{folder} does not fit the model: {', '.join(wrong[:8])}")
    if into.optimizer is not None:
        into.optimizer.load_state_dict(loaded["optimizer"])
    if into.router is not None:
        load_router(folder, into.router, into.router_optimizer)
    return read_training_state(folder)


def read_training_state(folder: Path) -> TrainingState | None:
    """Return what lies beside the tensors of a training run's checkpoint; None for weights alone."""
    state_file = folder / STATE_FILE
    if not state_file.is_file():
        return None
    content = json.loads(state_file.read_text())
    return TrainingState(content["step"], content["seed"], content["config"], content.get("origin", {}))


def load_router(folder: Path, router: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Load router weights (and Adam state); raises CheckpointError when the checkpoint has none or others."""
    path = folder / ROUTER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {ROUTER_FILE}: it was not written by train_elastic")
    tensors = load_file(path)
    weights = {name.removeprefix("router/"): t for name, t in tensors.items() if name.startswith("router/")}
    try:
        router.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is the router of another space or other budgets: {error}") from error
    if optimizer is None:
        return
    for name, parameter in router.named_parameters():
        fields = ("step", "exp_avg", "exp_avg_sq")
        saved = {field: tensors[f"adam/{name}/{field}"] for field in fields if f"adam/{name}/{field}" in tensors}
        if saved:
            on_device = {key: value if key == "step" else value.to(parameter.device) for key, value in saved.items()}
            optimizer.state[parameter] = on_device


def _router_tensors(router: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    tensors = {f"router/{name}": tensor.detach().cpu().contiguous() for name, tensor in router.state_dict().items()}
    if optimizer is not None:
        for name, parameter in router.named_parameters():
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{name}/{field}"] = value.detach().cpu().contiguous()
    return tensors


def _sharded_state(trained: Trainable, is_loading: bool) -> dict[str, Any]:
    """Describe the tensors of this rank as parts of global ones; keys are Megatron-Core's own parameter names."""
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    metadata = ensure_metadata_has_dp_cp_group({})
    sharded: dict[str, Any] = {"model": trained.model.sharded_state_dict(metadata=metadata)}
    if trained.optimizer is not None:
        sharded["optimizer"] = trained.optimizer.sharded_state_dict(
            sharded["model"], is_loading=is_loading, metadata=metadata
        )
    return sharded
