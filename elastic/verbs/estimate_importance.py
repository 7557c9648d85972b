"""The verb estimate_importance: score a parent, rank its parts, write the permuted (nested) parent and check it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from elastic.blend.sources import TrainingData, tokenizer_folder
from elastic.checkpoint.find import checkpoint_folder, resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import Trainable, begin_save, load_checkpoint
from elastic.config.verbs import ImportanceConfig
from elastic.data.stream import Samples, read_batch
from elastic.hf.reload import logit_difference, probe_tokens
from elastic.model.forward import Sequences, forward_hidden
from elastic.model.initialize import gathered_parameters
from elastic.model.model import ElasticModel, build_model
from elastic.model.sharding import shard_tensor
from elastic.rank.depth import DepthScores, rank_by_cosine, rank_layers
from elastic.rank.importance import Scores, collect_scores, make_ranking
from elastic.rank.permutation import Ranking, permute_parameter, save_ranking
from elastic.rank.without_data import magnitude_scores, random_scores
from elastic.router.phases import Phase
from elastic.run.folder import open_run_folder
from elastic.run.world import run_world
from elastic.space.space import Space
from elastic.verbs.text import LONGEST
from elastic.world.groups import World

RANKING_FILE = "ranking.safetensors"
# Relative to the largest logit. Sums run in another order; a GPU's matrix units round fp32 to TF32 on top.
LOGIT_TOLERANCE = {
    "cpu": {torch.float32: 1e-5, torch.bfloat16: 2e-2},
    "cuda": {torch.float32: 1e-2, torch.bfloat16: 2e-2},
}


class PermutationError(ValueError):
    """The permuted parent does not answer like the parent; nothing was written."""


def run_importance(config: ImportanceConfig, console: Console) -> Path:
    """Write ranking.safetensors and a checkpoint of the permuted parent; returns the run folder.

    Raises PermutationError, and writes no checkpoint, if the logits of the permuted parent moved.
    """
    phase = Phase(name="calibration", sequence_length=config.importance.sequence_length, steps=1)
    (samples,), data = TrainingData(config.data, [phase], config.seed).samples(), str(tokenizer_folder(config.data))
    with run_world(config) as here:
        full = config.init_from.verify == "full"
        start = resolve_checkpoint(config.init_from.parent, full=full, world=here, say=console.print)
        record = Record.read(start)
        space = Space(record.shape, {}, lanes=config.lanes)
        with open_run_folder(config.exp_manager, asdict(config), here) as folder:
            model = build_model(space, here.layout, seed=None)
            load_checkpoint(start, Trainable(model))
            model.eval()
            scores = _score_widths(config, model, space, samples, here)
            depth = _rank_layers(config, model, space, samples, here, console)
            ranking = make_ranking(scores, space, depth)
            before = _probe_logits(model, record, here)
            _permute_in_place(model, ranking, space, here)
            _check_unmoved(before, _probe_logits(model, record, here), here)
            methods = {"method": config.importance.method, "depth_method": config.importance.depth}
            origin = {"parent": str(start), "data": data, "tokens": str(scores.num_tokens)}
            if here.is_main:
                tensors = scores.tensors() | ({} if depth is None else depth.tensors())
                save_ranking(folder / RANKING_FILE, ranking, tensors, origin | methods)
            known = origin | {key: value for key, value in record.provenance.items() if key == LONGEST}
            told = ("permuted_parent", record.shape, config.lanes, ranking.depth, data)
            permuted = Record(*told, provenance=known)
            target = checkpoint_folder(folder, 0)
            begin_save(target, Trainable(model), permuted, None, here, start).finish()
            if here.is_main:
                console.print(f"layers, best first: {' '.join(map(str, ranking.depth))}")
                console.print(f"permuted parent, logits unmoved -> {target}", soft_wrap=True)
    return folder


def _calibration(config: ImportanceConfig, samples: Samples, here: World, num_sequences: int) -> Iterator[Sequences]:
    """Yield this replica's share of the calibration sequences, whole [B, S]; the same set at any layout."""
    section = config.importance
    for index in range(num_sequences // (section.micro_batch * here.data_size)):
        batch = read_batch(samples, 0, index, here.data_rank, here.data_size, section.micro_batch)
        yield Sequences(batch.tokens, batch.positions)


def _score_widths(config: ImportanceConfig, model: ElasticModel, space: Space, samples: Samples, here: World) -> Scores:
    match config.importance.method:
        case "magnitude":
            return magnitude_scores(model, space.parent)
        case "random":
            return random_scores(space.parent, config.seed)
        case _:
            return collect_scores(model, space, _calibration(config, samples, here, config.importance.num_sequences))


def _rank_layers(
    config: ImportanceConfig, model: ElasticModel, space: Space, samples: Samples, here: World, console: Console
) -> DepthScores | None:
    method = config.importance.depth
    if method == "none" or method == "last_first":  # for the type checker
        return None  # layers stay in their order, and a depth keeps the first of them
    batches = list(_calibration(config, samples, here, config.importance.depth_sequences))
    if method == "cosine":
        return rank_by_cosine(model, batches)
    with Progress(console=console, disable=not here.is_main) as bar:
        task = bar.add_task("ranking layers", total=None)
        return rank_layers(
            model,
            space,
            batches,
            method,
            stop_after=config.importance.max_removed_layers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


@torch.no_grad()
def _permute_in_place(model: ElasticModel, ranking: Ranking, space: Space, here: World) -> None:
    """Permute the parameters of this pipeline stage: gather a tensor's shards, reorder, keep this rank's shard."""
    shape, tp = space.parent, here.groups.tp
    for name, parameter, whole in gathered_parameters(model, shape):
        permuted = permute_parameter(whole, name, shape, ranking, space.lanes)
        parameter.copy_(shard_tensor(permuted, name, shape, tp.rank(), tp.size()))


@torch.no_grad()
def _probe_logits(model: ElasticModel, record: Record, here: World) -> Tensor | None:
    """Return this rank's vocabulary rows of the logits on fixed tokens, on the last stage."""
    hidden = forward_hidden(model, probe_tokens(record.shape.vocab))
    return None if hidden is None else (hidden @ model.head_weight().t()).float()


def _check_unmoved(before: Tensor | None, after: Tensor | None, here: World) -> None:
    """Compare on every rank and agree: one rank's doubt stops all."""
    moved, text = torch.zeros(1, device=here.device), ""
    if before is not None and after is not None:
        max_abs, relative = logit_difference(after, before)
        tolerance = LOGIT_TOLERANCE[here.device.type][here.layout.dtype]
        if not relative <= tolerance:  # NaN never is
            moved += 1
            text = f": largest difference {max_abs:.2e}, tolerance {tolerance:.0e} of the largest logit"
    torch.distributed.all_reduce(moved)
    if moved.item():
        raise PermutationError(f"the logits of the permuted parent moved{text}; no checkpoint was written")
