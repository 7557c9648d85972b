"""The two training verbs: a parent from scratch, and the family."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Family, Record, check_same_shape
from elastic.checkpoint.state import Trainable, TrainingState, load_checkpoint
from elastic.config.load import config_dict
from elastic.config.sections import DistillConfig
from elastic.config.verbs import ElasticConfig, PretrainConfig, TrainConfig
from elastic.data.stream import HeldOut, PhaseData, TokenStream
from elastic.hf.config import stock_notes
from elastic.model.backends import in_words
from elastic.model.model import build_model
from elastic.router.draw import Chooser
from elastic.router.phases import Curriculum
from elastic.router.router import Router
from elastic.router.sampler import in_turn
from elastic.run.folder import FINISHED_FILE
from elastic.run.resume import RunStart, load_run_state, open_training_run
from elastic.run.world import run_world
from elastic.space.cost import Budget
from elastic.space.reach import smallest_subnet
from elastic.space.space import Space
from elastic.train.callbacks import SaveCheckpoints, Validate
from elastic.train.log import LogSteps, RunLog, open_wandb
from elastic.train.nonfinite import SkippedSteps
from elastic.train.optimizer import build_optimizer, build_router_optimizer, set_hyperparameters, wrap_for_training
from elastic.train.pipeline import PipelineRunner
from elastic.train.sanity import Sanity
from elastic.train.signals import StopOnSignal
from elastic.train.trainer import Callback, Trainer
from elastic.verbs.text import LONGEST
from elastic.world.files import write_json
from elastic.world.groups import World
from elastic.world.watchdog import Watchdog

GO_ON = "set exp_manager.resume_if_exists=true and exp_manager.overwrite=false"


def run_pretrain(config: PretrainConfig, console: Console) -> Path:
    """Train a parent from scratch with cross-entropy; returns the run folder."""
    stream = TokenStream(Path(config.data.path) / "train")
    record = Record("parent", config.model.shape(), data=config.data.path, provenance=_provenance(config))
    loss = DistillConfig(kl_weight=0.0, cross_entropy_weight=1.0, num_chunks=1)
    with run_world(config) as here:
        return _train(config, here, stream, record, loss, console)


def run_elastic(config: ElasticConfig, console: Console, callbacks: Sequence[Callback] = ()) -> Path:
    """Train the family from the permuted parent, which is also the frozen teacher; returns the run folder.

    `callbacks` of the caller run after the run's own.
    """
    stream = TokenStream(Path(config.data.path) / "train")
    with run_world(config) as here:
        full = config.init_from.verify == "full"
        start = resolve_checkpoint(config.init_from.permuted_parent, full=full, world=here, say=console.print)
        parent = Record.read(start)
        check_same_shape(config.model.shape(), parent.shape, start)
        space = config.space(parent.depth_ranking)
        router_width = config.elastic.router.hidden_width
        family = Family(space.axes, config.budgets(), config.elastic.deployment, router_width, space.keep_at_least)
        provenance = {"permuted parent": str(start), "data": config.data.path, **_provenance(config)}
        record = Record("elastic", space.parent, space.lanes, space.depth_ranking, config.data.path, family, provenance)
        return _train(config, here, stream, record, config.distill, console, start, callbacks)


def _provenance(config: TrainConfig) -> dict[str, str]:
    """Return what every record of a training run says of it."""
    longest = max(phase.sequence_length for phase in config.curriculum)
    return {LONGEST: str(longest), "computed": in_words()}


def family_lines(space: Space, budgets: Sequence[Budget]) -> str:
    """Say what the router may choose and what is asked of it."""
    choices = {axis: " ".join(map(str, space.axes[axis].choices)) for axis in space.elastic_axes()}
    asked = ", ".join(f"{budget.name} {budget.target:,.0f} {budget.metric}" for budget in budgets)
    lines = ["choices", *(f"  {axis}: {widths}" for axis, widths in choices.items()), f"budgets: {asked}"]
    # Depth keeps layers in the order of their ranking: what the smallest depth keeps, every one keeps.
    notes = stock_notes(smallest_subnet(space).shape(space.parent))
    return "\n".join([*lines, *(f"note: of a member at the smallest depth, {note}" for note in notes)])


def _train(
    config: TrainConfig,
    here: World,
    stream: TokenStream,
    record: Record,
    loss: DistillConfig,
    console: Console,
    start: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train what `record` describes, a family from the permuted parent `start`, to its end or until it is stopped."""
    with open_training_run(config, stream.manifest, record, here, console.print, start) as opened:
        trainer = _trainer(config, here, stream, record, loss, start, opened)
        settings, folder = config.exp_manager, opened.folder
        if here.is_main:
            if trainer.chooser is not None:
                lines = family_lines(trainer.chooser.space, trainer.chooser.budgets)
                console.print(lines, markup=False, highlight=False)
            console.print(f"computed: {record.provenance['computed']}", markup=False, highlight=False)
            for change in opened.changes:
                console.print(f"accepted from step {trainer.step} on: {change}", highlight=False)
            if trainer.step < trainer.total_steps:
                (folder / FINISHED_FILE).unlink(missing_ok=True)  # there is more to do than when it was written
        wandb_run = None
        if here.is_main and settings.create_wandb_logger:
            wandb_run = open_wandb(folder, settings.name, settings.version, trainer.started.config)
        log = RunLog(
            folder if here.is_main else None,
            tensorboard=settings.create_tensorboard_logger,
            wandb_run=wandb_run,
            step=trainer.step,
            say=console.print,
        )
        trainer.callbacks = _callbacks(trainer, config, stream, log, console, callbacks)
        with Watchdog(trainer.progress, folder, config.trainer.watchdog_timeout_s):
            trainer.fit()
        log.close()
        if here.is_main and trainer.step >= trainer.total_steps:
            whole = trainer.curriculum.total_steps
            reason = "the curriculum's end" if trainer.step == whole else f"trainer.max_steps of {whole} steps"
            write_json(folder / FINISHED_FILE, {"step": trainer.step, "reason": reason})
        elif here.is_main:
            again = "run the same command" if settings.resume_if_exists else GO_ON
            console.print(f"stopped by {trainer.stop_reason} after step {trainer.step}; {again} to go on")
        return folder


def _trainer(
    config: TrainConfig,
    here: World,
    stream: TokenStream,
    record: Record,
    loss: DistillConfig,
    start: Path | None,
    opened: RunStart,
) -> Trainer:
    """Build student, teacher and router, and load them: from the run's own checkpoint, else from the parent `start`."""
    space, curriculum = record.space(), Curriculum(config.curriculum)
    student = build_model(space, here.layout, seed=config.seed, init_std=config.model.init_std)
    teacher = chooser = router = router_optimizer = None
    if start is not None:
        teacher = build_model(space, here.layout, seed=config.seed)
        for model in (teacher,) if opened.checkpoint else (student, teacher):
            load_checkpoint(start, Trainable(model))
        teacher.requires_grad_(False)
    if isinstance(config, ElasticConfig) and (family := record.family) is not None:
        router = Router(space, len(family.budgets), family.router_width, seed=config.seed).to(here.device)
        chooser = Chooser(router, space, family.budgets, family.deployment, config.elastic.router, config.seed)
        router_optimizer = build_router_optimizer(router, config.optim)
    wrapped = wrap_for_training(student, config.optim)
    optimizer = build_optimizer(wrapped, config.optim, here)
    names = () if chooser is None else tuple(budget.name for budget in chooser.budgets)
    trained = Trainable(student, optimizer, router, router_optimizer)
    sanity = Sanity(trained, here, config.seed, config.debug.sanity_every_n_steps)
    trainer = Trainer(
        world=here,
        runner=PipelineRunner(here, wrapped, loss, teacher),
        wrapped=wrapped,
        optimizer=optimizer,
        data=PhaseData(
            stream,
            curriculum,
            micro_batch_size=config.data.micro_batch,
            seed=config.seed,
            world=here,
            numbers=in_turn if chooser is None else chooser.numbers,
        ),
        curriculum=curriculum,
        record=record,
        run_folder=opened.folder,
        started=TrainingState(0, config.seed, config_dict(config), opened.origin),
        total_steps=min(curriculum.total_steps, config.trainer.max_steps or curriculum.total_steps),
        skipped=SkippedSteps(opened.folder, config.trainer.max_skipped_in_a_row, wrapped, here, names),
        chooser=chooser,
        router_optimizer=router_optimizer,
        carried_from=start,
        sanity=sanity if config.debug.sanity else None,
    )
    if opened.checkpoint is not None:
        trainer.step = load_run_state(opened.checkpoint, trainer.trainable(), record)
        set_hyperparameters(optimizer, config.optim)
    return trainer


def _callbacks(
    trainer: Trainer,
    config: TrainConfig,
    stream: TokenStream,
    log: RunLog,
    console: Console,
    further: Sequence[Callback],
) -> list[Callback]:
    settings, held_out = config.exp_manager, TokenStream(stream.prefix.with_name("validation"))
    names = ("parent",) if trainer.chooser is None else tuple(budget.name for budget in trainer.chooser.budgets)
    section = config.trainer
    return [
        Validate(
            [HeldOut(held_out, phase.sequence_length) for phase in trainer.curriculum.phases],
            log,
            every_steps=section.val_check_interval,
            num_sequences=config.data.validation_sequences,
            micro_batch_size=config.data.micro_batch,
        ),
        # Before the save: a step whose checkpoint is whole is not run again, and its row would be missing for ever.
        LogSteps(log, names, section, console, trainer.world),
        SaveCheckpoints(
            section.checkpoint_every_n_steps,
            keep_last=settings.keep_last_checkpoints,
            milestone_steps=settings.keep_milestones_every_n_steps,
            in_background=settings.async_save,
            log=log,
            console=console,
        ),
        *further,
        StopOnSignal(),  # last: its handlers stay until the final checkpoint is written
    ]
