"""The two training verbs: a parent from scratch, and the family."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from elastic.modules.model import ElasticModel, build_model
from elastic.router.draw import GateSource, Mode
from elastic.router.phases import Curriculum
from elastic.router.router import Router
from elastic.space.axes import Space
from elastic.train.callbacks import SaveCheckpoints, StopOnSignal, Validate
from elastic.train.checkpoint import Trainable, load_checkpoint, resolve_checkpoint
from elastic.train.config import ElasticConfig, PretrainConfig, TrainConfig, with_vocab
from elastic.train.config_elastic import DistillConfig
from elastic.train.data import PackedSequences, TokenStream
from elastic.train.logging import LogSteps, RunLog, ScalarWriter, WandbWriter
from elastic.train.optimizer import build_optimizer, build_router_optimizer, wrap_for_training
from elastic.train.parallel import World, model_layout, world
from elastic.train.phase_data import PhaseData
from elastic.train.pipeline import PipelineRunner
from elastic.train.record import Family, Record, check_same_shape
from elastic.train.run_folder import open_run_folder, write_json
from elastic.train.trainer import Callback, Trainer


def run_pretrain(config: PretrainConfig, console: Console) -> Path:
    """Train a parent from scratch with cross-entropy; returns the run folder."""
    stream = TokenStream(Path(config.data.path) / "train")
    config = with_vocab(config, stream.vocab_size)
    with world(model_layout(config.parallel, config.trainer), config.trainer.collective_timeout_s) as here:
        space = Space(config.parent_shape(), {}, lanes=1)
        model = build_model(space, here.layout, seed=config.seed, init_std=config.model.init_std)
        record = Record("parent", space.parent, data=config.data.path)
        loss = DistillConfig(kl_weight=0.0, cross_entropy_weight=1.0, num_chunks=1)
        trainer = _trainer(config, stream, here, model, None, record, config.curriculum_phases(), loss)
        return _fit(trainer, config, stream, (), console)


def run_elastic(config: ElasticConfig, console: Console, callbacks: Sequence[Callback] = ()) -> Path:
    """Train the family from the permuted parent, which is also the frozen teacher; returns the run folder.

    `callbacks` of the caller run after the run's own.
    """
    stream = TokenStream(Path(config.data.path) / "train")
    config = with_vocab(config, stream.vocab_size)
    start = resolve_checkpoint(config.init_from.permuted_parent)
    parent = Record.read(start)
    check_same_shape(config.parent_shape(), parent.shape, start)
    with world(model_layout(config.parallel, config.trainer), config.trainer.collective_timeout_s) as here:
        space = Space(config.parent_shape(), config.elastic.space.axes(), parent.lanes, parent.depth_ranking)
        student = build_model(space, here.layout, seed=config.seed)
        teacher = build_model(space, here.layout, seed=config.seed)
        for model in (student, teacher):
            load_checkpoint(start, Trainable(model))
        teacher.requires_grad_(False)
        router_config = config.elastic.router
        family = Family(space.axes, config.budgets(), config.deployment(), router_config.hidden_width)
        phases = config.curriculum_phases()
        gates = GateSource(
            router=Router(space, len(family.budgets), family.router_width, seed=config.seed).to(here.device),
            space=space,
            budgets=family.budgets,
            deployment=family.deployment,
            mode=Mode(router_config.mode),
            budget_loss_weight=router_config.budget_loss_weight,
            entropy_weight=router_config.entropy_weight,
            draws_per_step=router_config.draws_per_step,
            seed=config.seed,
        )
        provenance = {"permuted parent": str(start), "data": config.data.path}
        record = Record("elastic", space.parent, space.lanes, space.depth_ranking, config.data.path, family, provenance)
        trainer = _trainer(config, stream, here, student, teacher, record, phases, config.distill, gates)
        trainer.callbacks, trainer.carried_from = list(callbacks), start
        return _fit(trainer, config, stream, tuple(budget.name for budget in family.budgets), console)


def _trainer(
    config: TrainConfig,
    stream: TokenStream,
    here: World,
    student: ElasticModel,
    teacher: ElasticModel | None,
    record: Record,
    curriculum: Curriculum,
    loss: DistillConfig,
    gates: GateSource | None = None,
) -> Trainer:
    resolved: dict[str, Any] = asdict(config)
    resume = config.exp_manager.resume_if_exists
    folder, checkpoint = open_run_folder(config.exp_manager, resolved, here, resume=resume)
    wrapped = wrap_for_training(student, config.optim)
    trainer = Trainer(
        world=here,
        runner=PipelineRunner(here, wrapped, loss, teacher),
        wrapped=wrapped,
        optimizer=build_optimizer(wrapped, config.optim, here),
        data=PhaseData(stream, curriculum, micro_batch_size=config.data.micro_batch, seed=config.seed, world=here),
        curriculum=curriculum,
        record=record,
        run_folder=folder,
        seed=config.seed,
        config=resolved,
        total_steps=min(curriculum.total_steps, config.trainer.max_steps or curriculum.total_steps),
        gates=gates,
        router_optimizer=None if gates is None else build_router_optimizer(gates.router, config.optim),
    )
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, trainer.trainable())
        assert state is not None, "a run's own checkpoints always hold their state"
        trainer.step = state.step
    return trainer


def _fit(
    trainer: Trainer, config: TrainConfig, stream: TokenStream, budget_names: tuple[str, ...], console: Console
) -> Path:
    settings, folder = config.exp_manager, trainer.run_folder
    extra: tuple[ScalarWriter, ...] = ()
    if trainer.world.is_main and settings.create_wandb_logger:
        extra = (WandbWriter(folder, settings.name, settings.version, trainer.config),)
    log = RunLog(folder if trainer.world.is_main else None, tensorboard=settings.create_tensorboard_logger, extra=extra)
    held_out = TokenStream(stream.prefix.with_name("validation"))
    trainer.callbacks = [
        Validate(
            [PackedSequences(held_out, phase.sequence_length, config.seed) for phase in trainer.curriculum.phases],
            log,
            every_steps=config.trainer.val_check_interval,
            num_sequences=config.data.validation_sequences,
            micro_batch=config.data.micro_batch,
        ),
        SaveCheckpoints(config.trainer.checkpoint_every_n_steps, settings.keep_last_checkpoints),
        LogSteps(log, budget_names or ("parent",), config.trainer.log_every_n_steps, console),
        *trainer.callbacks,
        StopOnSignal(),  # last: its handlers stay until the final checkpoint is written
    ]
    trainer.fit()
    if trainer.world.is_main and trainer.step == trainer.total_steps:
        # A launcher starts no further job for a run that has this file.
        write_json(folder / "finished.json", {"step": trainer.step, "total_steps": trainer.total_steps})
    if trainer.world.is_main and trainer.stop_reason is not None:
        console.print(f"stopped by {trainer.stop_reason} after step {trainer.step}; run the same command to go on")
    return folder
