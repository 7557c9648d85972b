"""What one run needs from its cluster, and how far it has come: checked before a training process starts."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from elastic.blend.foreign import is_prepared
from elastic.config.load import Problem
from elastic.config.rules_layout import Cluster, data_parallel
from elastic.config.verbs import ElasticConfig, HeldOutConfig, ImportanceConfig, TrainConfig, VerbConfig
from elastic.data.manifest import DataError, checked_manifest
from elastic.preflight.node import Gpu, gib
from elastic.run.folder import FINISHED_FILE
from elastic.space.cost import shape_cost
from elastic.world.files import nearest_existing

WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
# What Adam keeps for a weight: two moments in fp32 and, beside half-precision weights, an fp32 copy of them.
OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12}
GRADIENT_BYTES = 4  # reduced in fp32 (optimizer.py)
USABLE_SHARE = 0.95  # of a GPU's memory; CUDA's and NCCL's own buffers take the rest


def plan_run(config: VerbConfig, phase: str | None) -> dict[str, str | int]:
    """Say what a launcher needs to know: where a run writes, at which step it ends, and whether it has got there.

    `phase` is the last one to train, which `override` makes the run end with; the steps are those of training.
    """
    run_dir, total, finished, override = Path(config.exp_manager.run_dir).absolute(), 0, False, ""
    names = [one.name for one in config.curriculum] if isinstance(config, TrainConfig) else []
    if isinstance(config, TrainConfig) and (phase is None or phase in names):
        steps = [one.num_steps for one in config.curriculum]
        last = len(steps) if phase is None else names.index(phase) + 1
        total = min(sum(steps[:last]), config.trainer.max_steps or sum(steps))
        finished = finished_step(run_dir) >= total
        override = "" if phase is None else f"trainer.max_steps={total}"
    says = "yes" if finished else "no"
    return {"run_dir": str(run_dir), "total_steps": total, "finished": says, "override": override}


def phase_problems(config: VerbConfig, phase: str | None) -> Iterator[Problem]:
    """The last phase to train must be one of the curriculum."""
    if not isinstance(config, TrainConfig):
        if phase:
            yield Problem("PHASE", phase, "only a training run has phases", "leave it out")
    elif phase is not None and phase not in (names := [one.name for one in config.curriculum]):
        yield Problem("PHASE", phase, "is not in the curriculum", f"it has {', '.join(names)}")


def finished_step(run_dir: Path) -> int:
    """Return the step at which the run says it ended as planned; -1 while it has not."""
    try:
        return int(json.loads((run_dir / FINISHED_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def run_problems(config: VerbConfig, cluster: Cluster, gpus: Sequence[Gpu]) -> Iterator[Problem]:
    """Judge data, disk and memory for a config that is legal in itself."""
    if isinstance(config, TrainConfig | ImportanceConfig | HeldOutConfig):
        sources = {f"data.blend.{index}.path": source.path for index, source in enumerate(config.data.blend)}
        for field, path in (sources or {"data.path": config.data.path}).items():
            try:  # every file is there, whole and the one that was prepared (sampled checksums)
                if not sources or is_prepared(Path(path)):
                    checked_manifest(Path(path), verify=config.data.verify)
            except DataError as error:
                yield Problem(field, path, str(error), "or give another folder")
    manager = config.exp_manager
    existing = nearest_existing(Path(manager.run_dir))
    if not os.access(existing, os.W_OK | os.X_OK):
        rule = f"may not be written by user {os.getuid()} ({existing})"
        yield Problem("exp_manager.exp_dir", manager.exp_dir, rule, "choose another, or change its owner")
    if isinstance(config, TrainConfig):
        # Every try of a job gets the same command, so a requeued one would begin by removing its own checkpoints.
        if manager.overwrite:
            rule = "every try of a job, and every link of a chain, would remove the run and start again"
            remedy = f"remove {manager.run_dir} by hand, or choose another version"
            yield Problem("exp_manager.overwrite", True, rule, remedy)
        yield from disk_problems(config, existing)
        yield from memory_problems(config, cluster, gpus)


def disk_problems(config: TrainConfig, existing: Path) -> Iterator[Problem]:
    """The disk must hold the checkpoints that stay and the one being written, less those that are there already."""
    each, there = checkpoint_bytes(config), len(list(Path(config.exp_manager.run_dir).glob("checkpoints/step_*")))
    free, count = shutil.disk_usage(existing).free, max(1, config.exp_manager.keep_last_checkpoints + 1 - there)
    if free < count * each:
        rule = f"{gib(count * each)} needed for {count} checkpoints of {gib(each)}"
        remedy = "free some, lower exp_manager.keep_last_checkpoints, or set exp_manager.exp_dir to another disk"
        yield Problem(f"free disk at {existing}", gib(free), rule, remedy)


def memory_problems(config: TrainConfig, cluster: Cluster, gpus: Sequence[Gpu]) -> Iterator[Problem]:
    """Weights, gradients and optimizer state alone must fit; activations come on top."""
    smallest = min((gpu.total_bytes for gpu in gpus), default=math.inf)
    needs = {where: state_bytes_per_rank(one, cluster) for where, one in config.layouts().items()}
    where, need = max(needs.items(), key=lambda entry: entry[1])  # the phase that takes most speaks for all
    if need > USABLE_SHARE * smallest:
        rule = f"weights, gradients and optimizer state of one rank take {gib(need)} before the first activation"
        raised = f"raise {where}parallel.tensor or {where}parallel.pipeline"
        yield Problem("GPU memory", gib(smallest), rule, f"{raised}, or set optim.use_distributed_optimizer=true")


def state_bytes_per_rank(config: TrainConfig, cluster: Cluster) -> float:
    """Return what one rank holds before any activation: student, its gradients and Adam, and the teacher's weights."""
    precision, parallel = config.trainer.precision, config.parallel
    replicas = data_parallel(parallel, cluster) * parallel.context
    shards = replicas if config.optim.use_distributed_optimizer else 1
    weights = WEIGHT_BYTES[precision]
    if isinstance(config, ElasticConfig) and config.distill.teacher == "frozen":
        weights += WEIGHT_BYTES[precision] if config.distill.teacher_precision == "bf16" else 1
    per_parameter = weights + GRADIENT_BYTES + OPTIMIZER_BYTES[precision] / shards
    # Context-parallel ranks repeat the weights of their replica.
    return int(shape_cost(config.model.shape()).params) * per_parameter / (parallel.tensor * parallel.pipeline)


def checkpoint_bytes(config: TrainConfig) -> float:
    """Return the size of one training checkpoint: weights and optimizer state, once."""
    precision = config.trainer.precision
    return int(shape_cost(config.model.shape()).params) * (WEIGHT_BYTES[precision] + OPTIMIZER_BYTES[precision])
