"""Score the layers of the parent by what their absence does to the logits (docs/method.md 1.1, eq. 5), or otherwise.

Shapes: B batch, S sequence, D hidden, V vocab, L layers; lower case = this tensor-parallel rank's shard.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.model.forward import Sequences, forward_hidden, sees_own_tokens, sum_over_world
from elastic.model.model import ElasticModel
from elastic.model.observe import LayerObserver
from elastic.rank.permutation import RankingError
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.shape import Subnet
from elastic.space.space import Space

# Token rows multiplied at once in fp64: 1024 x 5120 channels are 40 MiB.
CHUNK_TOKENS = 1024
CHUNK_VOCAB = 4096


@dataclass(frozen=True)
class DepthScores:
    """Layers in order, best first, and why: the same on every rank.

    `scores[j]` is layer j's eq. 5 when it was removed, or when last scored. `history` holds one entry per round: the
    score of every layer that was still there; the worst of them goes. Other methods have other scores, and no rounds.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]
    history: tuple[Mapping[int, float], ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return `depth` [L] and `depth_history` [rounds, L] for the ranking file, fp64, NaN where a layer was gone."""
        found = {"depth": torch.tensor(self.scores, dtype=torch.float64)}
        rounds = [[scores.get(index, math.nan) for index in range(len(self.order))] for scores in self.history]
        return found | ({"depth_history": torch.tensor(rounds, dtype=torch.float64)} if rounds else {})


def rank_layers(
    model: ElasticModel,
    space: Space,
    batches: Iterable[Sequences],
    method: Literal["iterative", "one_shot"] = "iterative",
    *,
    stop_after: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DepthScores:
    """Rank all layers by s_j = sum((M_full - M_without_j)^2) / sum(M_full^2), M the logits (eq. 5).

    `iterative` removes the least important layer, scores the rest without it, and so on; about L^2 / 2 passes over
    the batches. It stops after `stop_after` layers, by default what the space's smallest depth drops (all but one
    where depth is not elastic): the others are ranked by their last score. `one_shot` scores once, L passes. Of equal
    scores the later layer counts as the less important. Batches are those of `collect_scores`; `progress` is told
    passes done and passes in all. Raises RankingError without tokens or if a logit is not finite.
    """
    num_layers = len(space.parent.pattern)
    smallest = space.axes[Axis.DEPTH].choices[-1] if Axis.DEPTH in space.elastic_axes() else 1
    rounds = 1 if method == "one_shot" else num_layers - smallest if stop_after is None else stop_after
    if method not in ("iterative", "one_shot") or not 1 <= rounds < num_layers:
        raise RankingError(
            f"depth: method = {method}, stop_after = {stop_after}: the method is iterative or one_shot, and of "
            f"{num_layers} layers between 1 and {num_layers - 1} can be removed"
        )
    meter = _LogitMeter(model, space, batches)
    total, done = sum(num_layers - removed for removed in range(rounds)), 0
    present, removed_first = list(range(num_layers)), list[int]()
    history: list[dict[int, float]] = []
    for _ in range(rounds):
        changes = []
        for layer_index in present:
            changes.append(meter.change(tuple(other for other in present if other != layer_index)))
            done += 1
            if progress is not None:
                progress(done, total)
        history.append(dict(zip(present, meter.relative(changes), strict=True)))
        worst = min(reversed(present), key=history[-1].__getitem__)
        present.remove(worst)
        removed_first.append(worst)
    last = {layer_index: score for measured in history for layer_index, score in measured.items()}
    best = sorted(present, key=lambda layer_index: -last[layer_index])  # stable: ties by index
    scores = tuple(last[layer_index] for layer_index in range(num_layers))
    return DepthScores((*best, *reversed(removed_first)), scores, tuple(history))


def rank_by_cosine(model: ElasticModel, batches: Iterable[Sequences]) -> DepthScores:
    """Rank all layers by the mean over tokens of 1 - cosine(x, x'), x the stream in front of a layer, x' behind it.

    The public Minitron-SSM code's score; one pass. Of equal scores the later layer counts as the less important. Raises
    RankingError without tokens or if a score is not finite.
    """
    layer_indices = model.decoder.masks.layer_indices
    num_layers = len(model.decoder.masks.space.parent.pattern)
    totals = torch.zeros(num_layers, 2, dtype=torch.float64, device=next(model.parameters()).device)
    counts = sees_own_tokens(model)
    for batch in batches:
        turns = {index: _Turn(totals[index]) if counts else LayerObserver() for index in layer_indices}
        forward_hidden(model, batch.tokens, observer=turns.__getitem__, positions=batch.positions)
    sum_over_world(totals)
    scores = (totals[:, 0] / totals[:, 1]).tolist()
    if not all(map(math.isfinite, scores)):
        raise RankingError(
            "depth: the parent's stream is not finite, or there are no calibration tokens; score in fp32"
        )
    return DepthScores(tuple(sorted(range(num_layers), key=lambda index: -scores[index])), tuple(scores), ())


class _Turn(LayerObserver):
    """Adds to `total` [2], fp64, how far a layer turns the stream, and its tokens."""

    def __init__(self, total: Tensor) -> None:
        self._total = total

    def stream(self, before: Tensor, after: Tensor) -> None:
        """Add 1 - cosine of every token."""
        wide = torch.promote_types(before.dtype, torch.float32)
        turned = 1.0 - F.cosine_similarity(before.to(wide), after.to(wide), dim=-1)
        self._total += torch.stack([turned.sum(dtype=torch.float64), turned.new_full((), turned.numel()).double()])


class _LogitMeter:
    """Measures how far the logits move from the parent's when only some layers run.

    The head is linear, so a token whose final hidden state moves by x moves its logits by W x, and the sum of their
    squares is x^T (W^T W) x: with that [D, D] matrix no logits exist, and no difference of large logits is taken.
    """

    def __init__(self, model: ElasticModel, space: Space, batches: Iterable[Sequences]) -> None:
        self._model, self._space = model, space
        self._device = next(model.parameters()).device
        self._batches = list(batches)
        self._gram = self._head_gram() if model.post_process else None
        # One [S, B, D] per batch stays on the last stage, so that no round runs the whole parent again.
        self._references = [self._run(batch) for batch in self._batches]
        self._energy = sum(map(self._squares, self._references), self._zero())
        sum_over_world(self._energy)
        if not 0.0 < float(self._energy) < math.inf:
            raise RankingError(
                f"depth: the parent's squared logits sum to {float(self._energy)} over the calibration data; give at "
                "least one sequence, and a parent with finite, non-zero logits"
            )

    def change(self, kept_layers: tuple[int, ...]) -> Tensor:
        """Return this rank's part of sum((M_full - M_kept)^2), fp64."""
        gates = Gates.slice(replace(Subnet.full(self._space.parent), kept_layers=kept_layers))
        total = self._zero()
        for batch, reference in zip(self._batches, self._references, strict=True):
            total += self._squares(reference, self._run(batch, gates))
        return total

    def _run(self, batch: Sequences, gates: Gates | None = None) -> Tensor | None:
        return forward_hidden(self._model, batch.tokens, gates, positions=batch.positions)

    def relative(self, changes: Sequence[Tensor]) -> list[float]:
        """Sum `changes` over all ranks and divide by sum(M_full^2); raises RankingError if one is not finite."""
        together = torch.stack(list(changes))
        sum_over_world(together)
        scores = (together / self._energy).tolist()
        if not all(map(math.isfinite, scores)):
            raise RankingError("depth: without some layer the logits are not finite; score in fp32")
        return scores

    def _squares(self, hidden: Tensor | None, other: Tensor | None = None) -> Tensor:
        """Return the sum of squared logits of `hidden` [S(/tp), B, D], or of its difference from `other`."""
        total = self._zero()
        if hidden is None or self._gram is None or not sees_own_tokens(self._model):
            return total
        rows = hidden.flatten(0, 1).split(CHUNK_TOKENS)
        others = (None,) * len(rows) if other is None else other.flatten(0, 1).split(CHUNK_TOKENS)
        for chunk, subtracted in zip(rows, others, strict=True):
            x = chunk.double() if subtracted is None else chunk.double() - subtracted.double()
            total += ((x @ self._gram) * x).sum()
        return total

    @torch.no_grad()
    def _head_gram(self) -> Tensor:
        """Return W^T W of the whole head [D, D], fp64, summed over the vocabulary's shards."""
        weight = self._model.head_weight()
        gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=self._device)
        for rows in weight.split(CHUNK_VOCAB):
            gram.addmm_(rows.double().T, rows.double())
        tp = self._model.pg_collection.tp
        if tp.size() > 1:
            torch.distributed.all_reduce(gram, group=tp)
        return gram

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._device)
