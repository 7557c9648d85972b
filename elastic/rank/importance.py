"""Score the widths of the parent on calibration tokens (docs/method.md 1.1, eq. 1-4) and rank them, best first.

Every score is a sum over calibration tokens, so sums over micro-batches, replicas, context-parallel ranks and shards
add up to the scores of one process; nothing depends on the layout.

Shapes: S sequence, B batch, D hidden, F ffn, G Mamba groups, H Mamba heads, P Mamba head channels, KV key-value heads,
q query heads, A attention channels; lower case = this tensor-parallel rank's shard. X is a layer's input, LN its norm.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.model.forward import Sequences, forward_hidden, sees_own_tokens, sum_over_world
from elastic.model.model import ElasticModel
from elastic.model.observe import LayerObserver
from elastic.rank.depth import DepthScores
from elastic.rank.permutation import Order, Ranking, RankingError
from elastic.space.axes import Axis, LayerKind
from elastic.space.shape import ModelShape
from elastic.space.space import Space


@dataclass(frozen=True)
class Scores:
    """Width scores of the whole parent, fp64 on the CPU, larger is better, the same on every rank.

    Of activations here; `without_data.py` makes others. One entry per layer of the kind, in layer order, except
    `hidden`: one residual stream serves all layers.
    """

    hidden: Tensor  # [D], eq. 1
    ffn: tuple[Tensor, ...]  # [F], eq. 2
    mamba_inner: tuple[Tensor, ...]  # [H, P], the aggregated s that eq. 3 and 4 take norms of
    attention_heads: tuple[Tensor, ...]  # [q]
    num_top_channels: int  # D_top of eq. 4
    num_tokens: int

    def mamba_channels(self, ordinal: int) -> Tensor:
        """Return eq. 3 for one Mamba layer [P]: the L2 norm over heads of s[:, d]."""
        return torch.linalg.vector_norm(self.mamba_inner[ordinal], dim=0)

    def mamba_heads(self, ordinal: int) -> Tensor:
        """Return eq. 4 for one Mamba layer [H]: the L2 norm of s[h, D_top] over the best channels of eq. 3."""
        top = best_first(self.mamba_channels(ordinal))[: self.num_top_channels]
        return torch.linalg.vector_norm(self.mamba_inner[ordinal][:, top], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return every score under the name its order has in a ranking file."""
        named = {"hidden": self.hidden}
        for field in ("ffn", "mamba_inner", "attention_heads"):
            named |= {f"{field}.{ordinal}": score for ordinal, score in enumerate(getattr(self, field))}
        for ordinal in range(len(self.mamba_inner)):
            named[f"mamba_channels.{ordinal}"] = self.mamba_channels(ordinal)
            named[f"mamba_heads.{ordinal}"] = self.mamba_heads(ordinal)
        return named


def best_first(score: Tensor) -> Order:
    """Return the indices of `score` [n], largest first; equal scores keep their order."""
    return tuple(torch.argsort(score, descending=True, stable=True).tolist())


class _LayerTotals(LayerObserver):
    """Adds what one layer shows to this rank's part of the scores; `hidden` None: another rank counts these tokens."""

    def __init__(self, hidden: Tensor | None, inner: Tensor) -> None:
        self._hidden, self._inner = hidden, inner

    def normalised(self, x: Tensor) -> None:
        """Add eq. 1: sum over batch and sequence of abs(LN(X))_i."""
        if self._hidden is not None:
            self._hidden += x.abs().sum((0, 1), dtype=torch.float64)

    def ffn(self, pre_activation: Tensor) -> None:
        """Add eq. 2: sum of abs(X W1_i^T)."""
        self._inner += pre_activation.abs().sum((0, 1), dtype=torch.float64)

    def mamba_inner(self, x: Tensor) -> None:
        """Add the s of eq. 3: sum of abs(LN(X) W_x^T) per head and channel. The paper leaves the sum open: ours."""
        self._inner += x.abs().sum((0, 1), dtype=torch.float64)

    def query(self, query: Tensor) -> None:
        """Add the sum over tokens of the L2 norm of a head's query. No formula is published: ours."""
        wide = torch.promote_types(query.dtype, torch.float32)
        self._inner += torch.linalg.vector_norm(query, dim=-1, dtype=wide).sum((0, 1), dtype=torch.float64)


class ScoreCollector:
    """The observer of eq. 1-4: full-size totals, of which this rank fills its shard."""

    def __init__(self, model: ElasticModel, shape: ModelShape) -> None:
        device = next(model.parameters()).device
        self._tp, self._counts_tokens = model.pg_collection.tp, sees_own_tokens(model)
        self.hidden = torch.zeros(shape.hidden, dtype=torch.float64, device=device)
        self.inner = []  # per layer [F], [H, P] or [q]
        for layer_index, kind in enumerate(shape.pattern.kinds):
            channels = (shape.head_channels,) if kind is LayerKind.MAMBA else ()
            self.inner.append(torch.zeros(shape.width(layer_index), *channels, dtype=torch.float64, device=device))

    def layer(self, layer_index: int) -> _LayerTotals:
        """Return the observer of one layer; heads and neurons are sharded in runs, in rank order."""
        shard = self.inner[layer_index].chunk(self._tp.size())[self._tp.rank()]
        return _LayerTotals(self.hidden if self._counts_tokens else None, shard)


def collect_scores(model: ElasticModel, space: Space, batches: Iterable[Sequences]) -> Scores:
    """Run the whole parent over `batches` and return its width scores; the same on every rank.

    A batch holds whole sequences of this data-parallel rank: the ranks of one replica get the same batches, two
    replicas different ones. D_top is the smallest choice of the space, else half of the channels (ours). Raises
    RankingError without tokens or if an activation is not finite.
    """
    shape, groups = space.parent, model.pg_collection
    collector = ScoreCollector(model, shape)
    num_tokens = torch.zeros((), dtype=torch.int64, device=collector.hidden.device)
    for batch in batches:
        forward_hidden(model, batch.tokens, observer=collector.layer, positions=batch.positions)
        if groups.tp.rank() == groups.pp.rank() == groups.cp.rank() == 0:
            num_tokens += batch.tokens.numel()
    for total in (collector.hidden, *collector.inner, num_tokens):
        sum_over_world(total)  # what another rank owns is zero here
    smallest = space.axes[Axis.MAMBA_CHANNEL].choices[-1]

    def of_kind(kind: LayerKind) -> tuple[Tensor, ...]:
        return tuple(collector.inner[layer_index].cpu() for layer_index in shape.pattern.layers_of(kind))

    scores = Scores(
        hidden=collector.hidden.cpu(),
        ffn=of_kind(LayerKind.MLP),
        mamba_inner=of_kind(LayerKind.MAMBA),
        attention_heads=of_kind(LayerKind.ATTENTION),
        num_top_channels=smallest if Axis.MAMBA_CHANNEL in space.elastic_axes() else max(1, shape.head_channels // 2),
        num_tokens=int(num_tokens),
    )
    if scores.num_tokens == 0:
        raise RankingError("importance: the calibration data holds 0 tokens; give at least one sequence")
    broken = [name for name, score in scores.tensors().items() if not score.isfinite().all()]
    if broken:
        raise RankingError(
            f"importance: scores {', '.join(broken)} are not finite: the parent's activations overflow on the "
            "calibration data; check the parent's loss on it, or score in fp32"
        )
    return scores


def make_ranking(scores: Scores, space: Space, depth: DepthScores | None = None) -> Ranking:
    """Order every part of the parent, best first, heads inside their group (docs/design.md 2); ties keep their order.

    Without `depth` the layers stay in their order.
    """
    shape, mamba_layers = space.parent, range(len(scores.mamba_inner))

    def inside(score: Tensor, num_groups: int) -> tuple[Order, ...]:
        return tuple(best_first(group) for group in score.view(num_groups, -1))

    ranking = Ranking(
        hidden=best_first(scores.hidden),
        ffn=tuple(map(best_first, scores.ffn)),
        mamba_heads=tuple(inside(scores.mamba_heads(ordinal), shape.mamba_groups) for ordinal in mamba_layers),
        mamba_channels=tuple(best_first(scores.mamba_channels(ordinal)) for ordinal in mamba_layers),
        attention_heads=tuple(inside(score, shape.kv_heads) for score in scores.attention_heads),
        depth=depth.order if depth is not None else tuple(range(len(shape.pattern))),
    )
    ranking.check(shape)
    return ranking
