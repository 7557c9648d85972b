"""Checkpoints: Megatron-Core's format for model and optimizer, safetensors for the router, JSON for the rest.

    checkpoints/step_00000100/      written as step_00000100.writing, then renamed
        manifest.json               every file with size and checksum (contents.py): trusted after a look
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from elastic.checkpoint.contents import CheckpointError, check_whole
from elastic.checkpoint.optimizer_state import begin_state, sharded_optimizer_state
from elastic.checkpoint.read import first_line, refuse_code
from elastic.checkpoint.record import Record
from elastic.checkpoint.write import CheckpointWrite
from elastic.hf.export_settings import EXPORT_SETTINGS_FOLDER
from elastic.hf.safe_files import UnsafeFileError, read_json
from elastic.model.model import ElasticModel
from elastic.router.router import Router
from elastic.world.groups import World

ADAM = ("step", "exp_avg", "exp_avg_sq")
STATE_FILE, ROUTER_FILE = "state.json", "router.safetensors"
STATE_LIMIT_BYTES = 16 << 20


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
    optimizer: ChainedOptimizer | None = None
    router: nn.Module | None = None
    router_optimizer: Optimizer | None = None


def begin_save(
    folder: Path,
    trained: Trainable,
    record: Record,
    state: TrainingState | None,
    world: World,
    carried_from: Path | None = None,
    *,
    in_background: bool = False,
) -> CheckpointWrite:
    """Write one checkpoint aside; `finish` of the result, called by all ranks, renames it when everybody is done.

    `carried_from` is the checkpoint whose settings and tokenizer for exports (hf/export_settings.py) go along, if any.
    `in_background` copies the tensors and returns at once; the caller never lets two saves overlap. Raises
    CheckpointError on all ranks if one of them cannot write; an existing checkpoint is never replaced.
    """

    def add_files(writing: Path) -> None:
        record.write(writing)
        if trained.router is not None:
            save_file(_router_tensors(trained.router, trained.router_optimizer), writing / ROUTER_FILE)
        if carried_from is not None and (carried_from / EXPORT_SETTINGS_FOLDER).is_dir():
            shutil.copytree(carried_from / EXPORT_SETTINGS_FOLDER, writing / EXPORT_SETTINGS_FOLDER)
        if state is not None:
            (writing / STATE_FILE).write_text(json.dumps(vars(state), indent=1, default=str) + "\n")

    def sharded() -> dict[str, Any]:
        return _sharded_state(trained, is_loading=False)

    return CheckpointWrite(folder, sharded, world, add_files, in_background=in_background)


def load_checkpoint(folder: Path, into: Trainable) -> TrainingState | None:
    """Load whatever `into` holds, strictly, from any parallel layout; returns the training state if there is one.

    All ranks call this together. Raises CheckpointError for a checkpoint that is not whole (sizes; `verified` looks at
    the checksums), in which a pickle asks for code (nothing of it is run), or that does not fit.
    """
    # Rank 0 looks, all ranks raise.
    problem: list[CheckpointError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            check_whole(folder)
            refuse_code(folder)
        except CheckpointError as error:
            problem[0] = error
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]
    sharded = _sharded_state(into, is_loading=True)
    strict = "raise_all" if into.optimizer else "assume_ok_unexpected"
    try:
        loaded = dist_checkpointing.load(sharded, str(folder), strict=strict)
    except (Exception, CheckpointException) as error:  # torch's is no Exception; a damaged file may raise anything
        raise CheckpointError(f"{folder} does not fit the model, or is damaged: {first_line(error)}") from error
    missing, unexpected = into.model.load_state_dict(loaded["model"], strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    if wrong:
        raise CheckpointError(f"{folder} does not fit the model: {', '.join(wrong[:8])}")
    if into.optimizer is not None:
        into.optimizer.load_state_dict(loaded["optimizer"])
        for part in into.optimizer.chained_optimizers:
            begin_state(part)  # a checkpoint from before the first step says nothing of steps
    if into.router is not None:
        load_router(folder, into.router, into.router_optimizer)
    return read_training_state(folder)


def read_training_state(folder: Path) -> TrainingState | None:
    """Return what lies beside the tensors of a training run's checkpoint; None for weights alone."""
    state_file = folder / STATE_FILE
    if not state_file.is_file():
        return None
    try:
        content = read_json(state_file, STATE_LIMIT_BYTES)
        return TrainingState(*(content[entry.name] for entry in fields(TrainingState)))
    except (UnsafeFileError, KeyError) as error:
        raise CheckpointError(f"{state_file} is damaged: {error}; take another checkpoint") from error


def load_router(
    folder: Path,
    router: nn.Module,
    optimizer: Optimizer | None = None,
    budgets: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """Load router weights (and Adam state); raises CheckpointError when the checkpoint has none or others.

    `budgets`, names then and now, load a router of other budgets: its one-hot inputs are columns [hidden width,
    budgets], and move by the name of the budget. A new budget keeps its fresh values, with zero moments; Adam's step
    count stays: it corrects a bias that zero moments of a new column have again for a while.
    """
    path = folder / ROUTER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {ROUTER_FILE}: it was not written by train_elastic")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file, and was not read: {error}") from error
    if budgets is not None:
        _move_columns(tensors, router, *budgets)
    weights = {name.removeprefix("router/"): t for name, t in tensors.items() if name.startswith("router/")}
    try:
        router.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is the router of another space or other budgets: {error}") from error
    if optimizer is None:
        return
    for name, parameter in router.named_parameters():
        saved = {key: tensors[f"adam/{name}/{key}"] for key in ADAM if f"adam/{name}/{key}" in tensors}
        if saved:
            on_device = {key: value if key == "step" else value.to(parameter.device) for key, value in saved.items()}
            optimizer.state[parameter] = on_device


def _move_columns(tensors: dict[str, Tensor], router: nn.Module, then: Sequence[str], now: Sequence[str]) -> None:
    assert isinstance(router, Router)
    pairs = [(then.index(name), column) for column, name in enumerate(now) if name in then]
    for name in (f"networks.{axis}.0.weight" for axis in router.sizes):
        fresh = router.get_parameter(name).detach().cpu()
        for key in (f"router/{name}", f"adam/{name}/exp_avg", f"adam/{name}/exp_avg_sq"):
            if key in tensors:
                moved = fresh.clone() if key.startswith("router/") else torch.zeros_like(fresh)
                for source, column in pairs:
                    moved[:, column] = tensors[key][:, source]
                tensors[key] = moved


def _router_tensors(router: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    tensors = {f"router/{name}": tensor.detach().cpu().contiguous() for name, tensor in router.state_dict().items()}
    if optimizer is not None:
        for name, parameter in router.named_parameters():
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{name}/{field}"] = value.detach().cpu().contiguous()
    return tensors


def _sharded_state(trained: Trainable, is_loading: bool) -> dict[str, Any]:
    """Describe the tensors of this rank as parts of global ones; keys are Megatron-Core's own parameter names."""
    metadata = ensure_metadata_has_dp_cp_group({})
    sharded: dict[str, Any] = {"model": trained.model.sharded_state_dict(metadata=metadata)}
    if trained.optimizer is not None:
        sharded["optimizer"] = sharded_optimizer_state(trained.optimizer, sharded["model"], is_loading, metadata)
    return sharded
