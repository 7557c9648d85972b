"""Going on from a run's own checkpoint: is it a checkpoint of this run, and what has changed since?

The check reads JSON and a sample of the inputs, on rank 0, before a model is built or the folder is touched. What
may differ is in changes.py.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.checkpoint.find import list_checkpoints, newest_whole, set_aside_newer
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import Trainable, TrainingState, load_checkpoint, load_router, read_training_state
from elastic.config.load import config_dict, load_with_problems
from elastic.config.sections import TrainExpManagerConfig
from elastic.config.training import ElasticConfig, TrainConfig
from elastic.data.manifest import Manifest
from elastic.run.changes import (
    ABSENT,
    Difference,
    May,
    curriculum_differences,
    draw_differences,
    flatten,
    refusal,
    rule_of,
)
from elastic.run.folder import RunFolderError, prepare_run_folder, run_lock
from elastic.space.axes import Axis
from elastic.world.groups import World, decided_by_rank_0

SAMPLED_BYTES = 64 * 1024
REPLICAS, CHANGES = "replicas", "changes"  # what a checkpoint says of its run, beside the inputs's checksums


class ResumeError(RunFolderError):
    """A checkpoint of another run, or changes that nobody accepted."""


@dataclass(frozen=True)
class RunStart:
    """Where a training run writes, the checkpoint it goes on from, and what its own checkpoints say of its inputs."""

    folder: Path
    checkpoint: Path | None
    origin: Mapping[str, Any]
    changes: tuple[Difference, ...] = ()


@contextmanager
def open_training_run(
    config: TrainConfig,
    data: Manifest,
    record: Record,
    here: World,
    say: Callable[[str], object],
    permuted_parent: Path | None = None,
) -> Iterator[RunStart]:
    """Open the run folder for this process group alone, and find the checkpoint to go on from: whole, and judged.

    Every rank must call; all learn what rank 0 found, and share the look at the checksums. Newer checkpoints that are
    not whole are named to `say`, and renamed, so that the run can write those steps again. Raises ResumeError with
    every difference that exp_manager.accept_changes does not name, CheckpointError if no checkpoint is whole, and
    RunFolderError; nothing has been written then.
    """
    manager, folder = config.exp_manager, Path(config.exp_manager.run_dir)
    origin: dict[str, Any] = {}
    accepted: list[Difference] = []

    def check(checkpoint: Path) -> None:
        state, saved = read_training_state(checkpoint), Record.read(checkpoint)
        if state is None:
            raise ResumeError(
                f"{checkpoint} is a {saved.kind} that no training run wrote, so there is nothing to go on with; choose "
                f"another exp_manager.name or exp_manager.version"
            )
        found = list(differences(state, saved, config, record, origin))
        check_accepted(checkpoint, state.step, found, manager.accept_changes)
        accepted.extend(found)
        now = [{"step": state.step, "field": d.field, "then": str(d.then), "now": str(d.now)} for d in found]
        origin[CHANGES] = [*state.origin.get(CHANGES, []), *now]

    with run_lock(Path(manager.run_dir), here):
        decided_by_rank_0(lambda: origin.update(describe_origin(data, here.data_size, permuted_parent)), here)
        checkpoint = None
        if decided_by_rank_0(lambda: _goes_on(manager), here):
            checkpoint = newest_whole(folder, full=manager.verify_on_resume == "full", world=here, say=say)
            decided_by_rank_0(lambda: check(checkpoint), here)
            decided_by_rank_0(lambda: set_aside_newer(checkpoint, say), here)
        resume = manager.resume_if_exists
        decided_by_rank_0(lambda: prepare_run_folder(manager, config_dict(config), resume=resume), here)
        yield RunStart(folder, checkpoint, origin, tuple(accepted))


def _goes_on(manager: TrainExpManagerConfig) -> bool:
    return manager.resume_if_exists and not manager.overwrite and bool(list_checkpoints(Path(manager.run_dir)))


def check_accepted(where: Path, step: int, found: list[Difference], accepted: Collection[str]) -> None:
    """Raise ResumeError listing all differences unless each is acceptable and named in `accepted`.

    A name without a difference is no mistake: the same command goes on after the next interruption.
    """
    refused = [difference for difference in found if not difference.acceptable or difference.field not in accepted]
    if refused:
        raise ResumeError(refusal(where, step, found))


def differences(
    state: TrainingState, saved: Record, config: TrainConfig, record: Record, origin: Mapping[str, Any]
) -> Iterator[Difference]:
    """List what differs between a checkpoint (`state`, `saved`) and the run that wants to go on from it."""
    if saved.kind != record.kind:
        yield Difference("verb", saved.kind, record.kind, "another verb wrote this checkpoint", False, "use that verb")
        return
    kind = type(config)
    then, unreadable = load_with_problems(kind, state.config)
    for problem in unreadable:
        why = f"written by another version of this project ({problem.rule})"
        yield Difference(problem.field, problem.value, ABSENT, why, False, "go on with that version")
    yield from _field_differences(then, config)
    names: tuple[list[str], list[str]] = ([], [])
    if isinstance(then, ElasticConfig) and isinstance(config, ElasticConfig):
        names = tuple([b.name for b in c.elastic.budgets] for c in (then, config))  # type: ignore[assignment]
        yield from _budget_differences(saved, record, config, state.step)
    old, new = then.curriculum, config.curriculum
    yield from curriculum_differences(old, new, state.step, names)
    yield from draw_differences(then, config, state.origin.get(REPLICAS, 1), origin[REPLICAS], state.step)
    if saved.depth_ranking != record.depth_ranking:
        why = "the depth ranking of the permuted parent decides which layers a subnet keeps"
        yield Difference("init_from.permuted_parent (depth ranking)", saved.depth_ranking, record.depth_ranking, why,
                         False, "give the permuted parent the run started from")  # fmt: skip
    elif (kept := _kept_layers(saved)) != (now_kept := _kept_layers(record)) and kept.keys() == now_kept.keys():
        why = f"depths would keep other layers than the trained {list(kept.values())}"
        then_rule, now_rule = (dict(r.family.keep_at_least) if r.family else {} for r in (saved, record))
        yield Difference("elastic.space.keep_at_least", then_rule, now_rule, why, False,
                         "give what the run started with (null: no rule)")  # fmt: skip
    yield from _input_differences(state.origin.get("inputs", {}), origin["inputs"])


def _kept_layers(record: Record) -> dict[int, tuple[int, ...]]:
    space = record.space()
    return {depth: space.kept_layers(depth) for depth in space.axes[Axis.DEPTH].choices}


def _field_differences(then: TrainConfig, now: TrainConfig) -> Iterator[Difference]:
    old, new = flatten(config_dict(then)), flatten(config_dict(now))
    for path in sorted(old.keys() | new.keys()):
        first, second = old.get(path, ABSENT), new.get(path, ABSENT)
        if path == "model.pattern":  # the bars only say where a pipeline is cut
            first, second = str(first).replace("|", ""), str(second).replace("|", "")
        may, why = rule_of(path)
        if first != second and may is not May.CHANGE:
            yield Difference(path, first, second, why, may is May.BE_ACCEPTED)


def _budget_differences(saved: Record, record: Record, config: ElasticConfig, step: int) -> Iterator[Difference]:
    """Compare budgets by name, metric and absolute target. A new one needs steps in which the router still learns."""
    assert saved.family is not None and record.family is not None
    if saved.family.budgets == record.family.budgets:
        return
    old, new = (", ".join(f"{b.name} {b.metric} {b.limit:g}" for b in r.family.budgets) for r in (saved, record))  # type: ignore[union-attr]
    end, learns = 0, False
    for phase in config.curriculum:
        end += phase.num_steps
        learns |= end > step and not phase.router_frozen
    if learns:
        why = "a target moves, a new budget's inputs to the router start fresh, those of a budget left out are dropped"
        yield Difference("elastic.budgets", old, new, why, True)
    else:
        why = "no step is left in which the router could learn them"
        yield Difference("elastic.budgets", old, new, why, False, "add a phase with router_frozen=false, or start anew")


def _input_differences(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted(then.keys() & now.keys()):
        if then[name] != now[name]:
            why = "the same path holds other content, or it is another path: the checksum differs"
            yield Difference(name, then[name][:12], now[name][:12], why, False, "give what the run started with")


def load_run_state(checkpoint: Path, into: Trainable, record: Record) -> int:
    """Load everything a run goes on with and return its step; the router's inputs follow the names of the budgets."""
    before = Record.read(checkpoint).family
    old, new = ([b.name for b in family.budgets] if family else [] for family in (before, record.family))
    if old == new:
        state = load_checkpoint(checkpoint, into)
    else:
        state = load_checkpoint(checkpoint, Trainable(into.model, into.optimizer))
        assert into.router is not None
        load_router(checkpoint, into.router, into.router_optimizer, (old, new))
    assert state is not None, "a run's own checkpoints always hold their state"
    return state.step


def describe_origin(data: Manifest, replicas: int, permuted_parent: Path | None = None) -> dict[str, Any]:
    """Return what goes into a checkpoint beside the config: checksums of the inputs, and the number of replicas.

    Reads data.json, and of the permuted parent its record and a sample of its files.
    """
    inputs = {"data.path (tokenizer)": data.tokenizer.sha256}
    for name, split in data.splits.items():
        inputs[f"data.path ({name} split)"] = _joined({file: record.sha256 for file, record in split.files.items()})
    if permuted_parent is not None:
        inputs["init_from.permuted_parent"] = weights_sha256(permuted_parent)
    return {"inputs": inputs, REPLICAS: replicas}


def weights_sha256(checkpoint: Path) -> str:
    """Hash the names and sizes of a checkpoint's tensor files, and 64 KiB from the middle of each."""
    parts = {}
    for path in sorted(checkpoint.glob("*.distcp")):
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, (size - SAMPLED_BYTES) // 2))
            parts[path.name] = f"{size}:{hashlib.sha256(stream.read(SAMPLED_BYTES)).hexdigest()}"
    return _joined(parts)


def _joined(parts: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {text}" for name, text in sorted(parts.items())).encode()).hexdigest()
