"""The two training verbs, a parent from scratch and the family, by one body: the config says which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from rich.console import Console
from torch.optim import Optimizer

from elastic.blend.sources import TrainingData, open_held_out, open_sources, tokenizer_folder
from elastic.checkpoint.find import checkpoint_folder
from elastic.checkpoint.record import Family, Record
from elastic.checkpoint.state import Trainable, TrainingState, load_checkpoint, read_training_state
from elastic.config.latency import latency_notes
from elastic.config.load import config_dict
from elastic.config.sections import DistillConfig
from elastic.config.verbs import ElasticConfig, TrainConfig
from elastic.data.stream import PhaseData, Samples
from elastic.hf.config import stock_notes
from elastic.model.backends import in_words
from elastic.model.model import build_model
from elastic.router.draw import Chooser
from elastic.router.phases import Curriculum, Phase
from elastic.router.router import Router
from elastic.router.sampler import in_turn
from elastic.run.changes import PACKING
from elastic.run.folder import FINISHED_FILE
from elastic.run.resume import RunStart, load_run_state, open_training_run
from elastic.run.world import model_layout, run_world
from elastic.space.cost import Budget, in_figures
from elastic.space.latency import Machine
from elastic.space.reach import smallest_subnet
from elastic.space.space import Space
from elastic.train.callbacks import SaveCheckpoints, Validate
from elastic.train.log import LogSteps, RunLog, open_wandb
from elastic.train.nonfinite import SkippedSteps
from elastic.train.optimizer import build_optimizer, build_router_optimizer, set_hyperparameters, wrap_for_training
from elastic.train.pipeline import PipelineRunner
from elastic.train.sanity import Sanity
from elastic.train.signals import StopOnSignal
from elastic.train.start import StartAtEvenCuts
from elastic.train.trainer import Callback, Placed, Trainer
from elastic.verbs.going_on import begin_router, family_checkpoint
from elastic.verbs.parent import nested_parent
from elastic.verbs.report import ReportError, write_report
from elastic.verbs.text import LONGEST
from elastic.world.files import write_json
from elastic.world.groups import World, join_world
from elastic.world.watchdog import Progress, Watchdog

FROM_SCRATCH = DistillConfig(kl_weight=0.0, cross_entropy_weight=1.0)
GO_ON = "set exp_manager.resume_if_exists=true and exp_manager.overwrite=false"


def run_training(config: TrainConfig, console: Console, callbacks: Sequence[Callback] = ()) -> Path:
    """Train a parent from scratch with cross-entropy; of an ElasticConfig, the family from the permuted parent, which
    is also the teacher. Returns the run folder, at the end or when it is stopped.

    `callbacks` of the caller run after the run's own.
    """
    data, settings = TrainingData(config.data, config.curriculum, config.seed), config.exp_manager
    sequences = [f"{phase.name}: {it}" for phase, it in zip(config.curriculum, data.samples(), strict=True)]
    with run_world(config.of(config.curriculum[0])) as here:
        packed = {PACKING: data.in_words, "sequences": "; ".join(sequences)}
        family = family_checkpoint(config, here, console.print) if isinstance(config, ElasticConfig) else None
        goes_on = {} if family is None else {"family": str(family)}
        start, record = _started_from(config, here, console, goes_on | packed)
        with open_training_run(config, data, record, here, console.print, start, family) as opened:
            trainer, folder = _trainer(config, here, data, record, opened), opened.folder
            wandb_run = None
            if here.is_main:
                if trainer.chooser is not None:
                    lines = family_lines(trainer.chooser.space, trainer.chooser.budgets)
                    times = latency_notes(trainer.chooser.deployment, trainer.chooser.space, Machine.here())
                    console.print("\n".join([lines, *times]), markup=False, highlight=False)
                console.print(f"computed: {record.provenance['computed']}", markup=False, highlight=False)
                console.print(*(f"data of {line}" for line in sequences), sep="\n", markup=False, highlight=False)
                for change in opened.changes:
                    console.print(f"accepted from step {trainer.step} on: {change}", highlight=False)
                if trainer.step < trainer.total_steps:
                    (folder / FINISHED_FILE).unlink(missing_ok=True)  # there is more to do than when it was written
                if settings.create_wandb_logger:
                    wandb_run = open_wandb(folder, settings.name, settings.version, trainer.started.config)
            log = RunLog(
                folder if here.is_main else None,
                tensorboard=settings.create_tensorboard_logger,
                wandb_run=wandb_run,
                step=trainer.step,
                say=console.print,
            )
            own = [*_start(config, trainer, console, opened), *_callbacks(config, trainer, log, console, data, opened)]
            # Last: its handlers stay until the final checkpoint is written.
            trainer.callbacks = [*own, *callbacks, StopOnSignal()]
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
            if here.is_main:
                try:
                    write_report(folder)
                except ReportError as error:  # no reason to fail what has been trained and saved
                    console.print(f"note: {error}", markup=False, highlight=False)
            return folder


def _started_from(
    config: TrainConfig, here: World, console: Console, packed: Mapping[str, str]
) -> tuple[Path | None, Record]:
    """Return the permuted parent's checkpoint (None: from scratch), and the record of what is trained."""
    longest, data = max(phase.sequence_length for phase in config.curriculum), str(tokenizer_folder(config.data))
    provenance = {LONGEST: str(longest), "computed": in_words(), **packed}
    if not isinstance(config, ElasticConfig):
        return None, Record("parent", config.model.shape(), data=data, provenance=provenance)
    start, space = nested_parent(config, here, console.print)
    section = config.elastic
    family = Family(space.axes, config.budgets(), section.deployment, section.router.hidden_width, space.keep_at_least)
    provenance = {"permuted parent": str(start), "data": data, **provenance}
    return start, Record("elastic", space.parent, space.lanes, space.depth_ranking, data, family, provenance)


def family_lines(space: Space, budgets: Sequence[Budget]) -> str:
    """Say what the router may choose and what is asked of it."""
    choices = {axis: " ".join(map(str, space.axes[axis].choices)) for axis in space.elastic_axes()}
    asked = ", ".join(f"{budget.name} {in_figures(budget.metric, budget.limit)} {budget.metric}" for budget in budgets)
    lines = ["choices", *(f"  {axis}: {widths}" for axis, widths in choices.items()), f"budgets: {asked}"]
    # Depth keeps layers in the order of their ranking: what the smallest depth keeps, every one keeps.
    notes = stock_notes(smallest_subnet(space).shape(space.parent))
    return "\n".join([*lines, *(f"note: of a member at the smallest depth, {note}" for note in notes)])


@dataclass
class _Places:
    """Builds what follows a run's layout: student and teacher, their groups, the optimizer."""

    config: TrainConfig
    device: torch.device
    datasets: Sequence[Samples]
    record: Record
    opened: RunStart
    chooser: Chooser | None
    router_optimizer: Optimizer | None
    progress: Progress

    def again(self, step: int) -> Placed:
        """Place the run where the phase of `step` goes on, from what was saved at `step`."""
        phase = Curriculum(self.config.curriculum).at(step).phase
        return self.at(phase, step, checkpoint_folder(self.opened.folder, step))

    def at(self, phase: Phase, step: int, checkpoint: Path | None, here: World | None = None) -> Placed:
        """Build the layout of `phase` and load it: from the run's own checkpoint, else from the parent.

        Each build and each load is one thing to the watchdog.
        """
        config, space, start = self.config.of(phase), self.record.space(), self.opened.permuted_parent
        layout = model_layout(config.parallel, config.trainer)
        if here is None or here.layout != layout:
            here = join_world(layout, self.device, config.trainer.collective_timeout_s)
        loss = config.distill if isinstance(config, ElasticConfig) else FROM_SCRATCH
        seed = config.seed if start is None and checkpoint is None else None  # a checkpoint has all weights
        self.progress.enter(step, "building the student")
        student, teacher = build_model(space, layout, seed=seed, init_std=config.model.init_std), None
        if start is not None and checkpoint is None:
            self.progress.enter(step, "loading the parent")
            load_checkpoint(self.opened.family or start, Trainable(student))
        if start is not None and loss.teacher == "frozen":
            self.progress.enter(step, "building the teacher")
            teacher = build_model(space, layout, seed=None)
            self.progress.enter(step, "loading the teacher")
            load_checkpoint(start, Trainable(teacher))
            teacher.requires_grad_(False)
            if loss.teacher_precision == "fp8":
                teacher.quantise()
        self.progress.enter(step, "building the optimizer")
        wrapped = wrap_for_training(student, config.optim)
        optimizer = build_optimizer(wrapped, config.optim, here)
        router = None if self.chooser is None else self.chooser.router
        trained = Trainable(student, optimizer, router, self.router_optimizer)
        if checkpoint is not None:
            self.progress.enter(step, "loading the checkpoint")
            load_run_state(checkpoint, trained, self.record)
            set_hyperparameters(optimizer, config.optim)
        numbers = in_turn if self.chooser is None else self.chooser.numbers
        debug = config.debug
        return Placed(
            world=here,
            runner=PipelineRunner(here, wrapped, loss, teacher),
            wrapped=wrapped,
            optimizer=optimizer,
            data=PhaseData(self.datasets, micro_batch_size=config.data.micro_batch, world=here, numbers=numbers),
            sanity=Sanity(trained, here, config.seed, debug.sanity_every_n_steps) if debug.sanity else None,
        )


def _trainer(config: TrainConfig, here: World, data: TrainingData, record: Record, opened: RunStart) -> Trainer:
    """Build router, student and teacher, and load them: from the run's own checkpoint, else from the parent."""
    curriculum, state = Curriculum(config.curriculum), None
    total_steps = min(curriculum.total_steps, config.trainer.max_steps or curriculum.total_steps)
    chooser = router_optimizer = None
    if isinstance(config, ElasticConfig) and (family := record.family) is not None:
        space = record.space()
        router = Router(space, len(family.budgets), family.router_width, seed=config.seed).to(here.device)
        if opened.checkpoint is None:
            begin_router(router, config, space, opened.family)
        chooser = Chooser(router, space, family.budgets, family.deployment, config.elastic.router, config.seed)
        router_optimizer = build_router_optimizer(router, config.optim)
    if opened.checkpoint is not None:
        state = read_training_state(opened.checkpoint)
    step = 0 if state is None else state.step
    samples, progress = data.samples(opened.carried), Progress()
    places = _Places(config, here.device, samples, record, opened, chooser, router_optimizer, progress)
    placed = places.at(curriculum.at(min(step, curriculum.total_steps - 1)).phase, step, opened.checkpoint, here)
    ends = accumulate(phase.num_steps for phase in config.curriculum)
    pairs = zip(ends, pairwise(map(config.of, config.curriculum)), strict=False)
    return Trainer(
        **vars(placed),
        curriculum=curriculum,
        record=record,
        run_folder=opened.folder,
        started=TrainingState(0, config.seed, config_dict(config), opened.origin),
        total_steps=total_steps,
        skipped=SkippedSteps(
            opened.folder, config.trainer.max_skipped_in_a_row, placed.wrapped, placed.world, _budgets(record)
        ),
        chooser=chooser,
        router_optimizer=router_optimizer,
        carried_from=opened.permuted_parent,
        step=step,
        moves=[step for step, (before, after) in pairs if before != after],
        place=places.again,
        progress=progress,
    )


def _budgets(record: Record) -> tuple[str, ...]:
    return () if record.family is None else tuple(budget.name for budget in record.family.budgets)


def _start(config: TrainConfig, trainer: Trainer, console: Console, opened: RunStart) -> list[Callback]:
    """Return what moves the router to even cuts, of budgets that begin with nothing else."""
    if not isinstance(config, ElasticConfig) or config.elastic.router.start != "even_cuts":
        return []
    begun = {given.name for given in config.init_from.subnets}
    if opened.family is not None:
        begun |= set(_budgets(Record.read(opened.family)))
    length = trainer.curriculum.phases[0].sequence_length
    held_out = open_held_out(config.data, open_sources(config.data, "validation"), length)
    return [StartAtEvenCuts(held_out, config.data.validation_sequences, begun, console)]


def _callbacks(
    config: TrainConfig, trainer: Trainer, log: RunLog, console: Console, data: TrainingData, opened: RunStart
) -> list[Callback]:
    settings, section, held_out = config.exp_manager, config.trainer, open_sources(config.data, "validation")
    count = config.data.validation_sequences
    return [
        Validate(
            [open_held_out(config.data, held_out, phase.sequence_length) for phase in trainer.curriculum.phases],
            log,
            section.val_check_interval,
            count,
        ),
        # Before the save: a step whose checkpoint is whole is not run again, and its row would be missing for ever.
        LogSteps(
            log,
            _budgets(trainer.record) or ("parent",),
            section,
            console,
            trainer.world,
            data.names,
            lambda step: data.epochs(step, opened.carried) if data.names else {},
        ),
        SaveCheckpoints(
            section.checkpoint_every_n_steps,
            settings.keep_last_checkpoints,
            settings.keep_milestones_every_n_steps,
            settings.async_save,
            log,
            console,
        ),
    ]
