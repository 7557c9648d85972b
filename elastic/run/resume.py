"""Going on from a run's own checkpoint: is it a checkpoint of this run, and what has changed since?

The check reads JSON and a sample of the inputs, on rank 0, before a model is built or the folder is touched. What
may differ is in changes.py.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic.blend.shares import Carried
from elastic.blend.sources import TrainingData
from elastic.checkpoint.find import list_checkpoints, newest_whole, set_aside_newer
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import Trainable, TrainingState, load_checkpoint, load_router, read_training_state
from elastic.config.load import ConfigError, config_dict, load_with_problems
from elastic.config.sections import TrainExpManagerConfig
from elastic.config.verbs import TrainConfig
from elastic.run.changes import REPLICAS, Difference, ResumeError, differences
from elastic.run.folder import prepare_run_folder, run_lock
from elastic.world.groups import World, decided_by_rank_0

SAMPLED_BYTES = 64 * 1024
CHANGES = "changes"  # accepted ones, in what a checkpoint says of its run
BLEND = "blend"  # where the weights of a blend changed, likewise


@dataclass(frozen=True)
class RunStart:
    """Where a training run writes, the checkpoint it goes on from, a family's permuted parent, and what its own
    checkpoints say of its inputs."""

    folder: Path
    checkpoint: Path | None
    permuted_parent: Path | None
    origin: Mapping[str, Any]
    changes: tuple[Difference, ...] = ()
    family: Path | None = None  # whose weights and router it begins with
    carried: Carried | None = None  # where the run changed the weights of its blend


@contextmanager
def open_training_run(
    config: TrainConfig,
    data: TrainingData,
    record: Record,
    here: World,
    say: Callable[[str], object],
    permuted_parent: Path | None = None,
    family: Path | None = None,
) -> Iterator[RunStart]:
    """Open the run folder for this process group alone, and find the checkpoint to go on from: whole, and judged.

    Every rank must call; all learn what rank 0 found, and share the look at the checksums. Newer checkpoints that are
    not whole are named to `say`, and renamed, so that the run can write those steps again. Raises ResumeError with
    every difference that exp_manager.accept_changes does not name, CheckpointError if no checkpoint is whole, and
    RunFolderError; nothing has been written then.
    """
    manager, folder = config.exp_manager, Path(config.exp_manager.run_dir)
    resume = manager.resume_if_exists
    origin: dict[str, Any] = {}
    accepted: list[Difference] = []
    carried: Carried | None = None

    def check(checkpoint: Path) -> Carried | None:
        state, saved = read_training_state(checkpoint), Record.read(checkpoint)
        if state is None:
            raise ResumeError(
                f"{checkpoint} is a {saved.kind} that no training run wrote, so there is nothing to go on with; choose "
                f"another exp_manager.name or exp_manager.version"
            )
        accepted.extend(differences(state, saved, config, record, origin))
        check_accepted(checkpoint, state.step, accepted, manager.accept_changes)
        now = [{"step": state.step, "field": d.field, "then": str(d.then), "now": str(d.now)} for d in accepted]
        origin[CHANGES] = [*state.origin.get(CHANGES, []), *now]
        carried = carried_blend(state, config, data)
        set_aside_newer(checkpoint, say)
        return carried

    with run_lock(folder, here):
        decided_by_rank_0(lambda: origin.update(describe_origin(data, here.data_size, permuted_parent, family)), here)
        checkpoint = None
        if decided_by_rank_0(lambda: goes_on(manager), here):
            checkpoint = newest_whole(folder, full=manager.verify_on_resume == "full", world=here, say=say)
            carried = decided_by_rank_0(lambda: check(checkpoint), here)
            if carried is not None:
                origin[BLEND] = asdict(carried)
        decided_by_rank_0(lambda: prepare_run_folder(manager, config_dict(config), resume=resume), here)
        yield RunStart(folder, checkpoint, permuted_parent, origin, tuple(accepted), family, carried)


def check_accepted(where: object, step: int, found: Sequence[Difference], accepted: Collection[str]) -> None:
    """Raise ResumeError listing all differences, and the one setting that accepts those that can be, unless all are.

    A name without a difference is no mistake: the same command goes on after the next interruption.
    """
    fixed = [difference for difference in found if not difference.acceptable]
    open_ = [difference for difference in found if difference.acceptable]
    if not fixed and all(difference.field in accepted for difference in open_):
        return
    count = "1 difference" if len(found) == 1 else f"{len(found)} differences"
    lines = [f"{where} (step {step}) is of another run, {count} from this configuration:"]
    if fixed:
        lines += ["  cannot change in a run:", *(f"    {difference}" for difference in fixed)]
    if open_:
        lines += ["  change the run from here on:", *(f"    {difference}" for difference in open_)]
        names = ",".join(dict.fromkeys(difference.field for difference in open_))
        lines.append(f"  to accept {'these' if fixed else 'them'}: 'exp_manager.accept_changes=[{names}]'")
    start = "a new run may start from the same permuted parent"
    lines.append(f"  to leave that run alone: choose another exp_manager.version; {start}")
    raise ResumeError("\n".join(lines))


def goes_on(manager: TrainExpManagerConfig) -> bool:
    """Tell whether a run will go on from a checkpoint of its own."""
    return manager.resume_if_exists and not manager.overwrite and bool(list_checkpoints(Path(manager.run_dir)))


def carried_blend(state: TrainingState, config: TrainConfig, data: TrainingData) -> Carried | None:
    """Return where a run that goes on from `state` last changed the weights of its blend; None: never."""
    then, _ = load_with_problems(type(config), state.config)
    before = state.origin.get(BLEND)
    try:
        start = None if before is None else Carried(**before)
    except TypeError as error:
        rule = f"the checkpoint's record of its blend is of another version ({error})"
        raise ResumeError(f"{rule}; go on with the version that wrote it, or begin a new run") from error
    carried = data.carried(then.data, then.curriculum, start, state.step)
    if problems := tuple(data.end_problems(config.trainer.max_steps or data.curriculum.total_steps, carried)):
        raise ConfigError(problems)
    return carried


def load_run_state(checkpoint: Path, into: Trainable, record: Record) -> int:
    """Load everything a run goes on with and return its step; the router's inputs follow the names of the budgets."""
    state = load_checkpoint(checkpoint, Trainable(into.model, into.optimizer))
    if into.router is not None:
        families = (Record.read(checkpoint).family, record.family)
        then, now = ([budget.name for budget in family.budgets] if family else [] for family in families)
        load_router(checkpoint, into.router, into.router_optimizer, (then, now))
    assert state is not None, "a run's own checkpoints always hold their state"
    return state.step


def describe_origin(
    data: TrainingData, replicas: int, permuted_parent: Path | None = None, family: Path | None = None
) -> dict[str, Any]:
    """Return what goes into a checkpoint beside the config: checksums of the inputs, and the number of replicas.

    Reads data.json (of what another tool wrote, a sample), and of permuted parent and family a sample.
    """
    inputs = {"data.path (tokenizer)": data.tokenizer.sha256}
    inputs |= {name: _joined(files) for name, files in data.checksums().items()}
    for name, checkpoint in (("permuted_parent", permuted_parent), ("family", family)):
        if checkpoint is not None:
            inputs[f"init_from.{name}"] = weights_sha256(checkpoint)
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
