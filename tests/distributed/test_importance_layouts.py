"""Scores and rankings do not depend on how the parent is spread; a permutation that moves the logits is refused."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import Tensor

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.config.load import load
from elastic.config.verbs import ImportanceConfig
from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.forward import SequenceLengthError, Sequences, context_parallel_slice, forward_hidden
from elastic.model.model import build_model
from elastic.rank.depth import rank_by_cosine, rank_layers
from elastic.rank.importance import collect_scores, make_ranking
from elastic.rank.without_data import magnitude_scores
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.space import AxisChoices, Space
from elastic.verbs.estimate_importance import PermutationError, run_importance
from elastic.world.groups import Layout, join_world
from tests.distributed.harness import run_distributed
from tests.distributed.training import place
from tests.shapes import UNEVEN as SHAPE

SPACE = Space(
    SHAPE,
    {Axis.HIDDEN: AxisChoices((24, 14)), Axis.MAMBA_CHANNEL: AxisChoices((6, 3)), Axis.DEPTH: AxisChoices((5, 2))},
    lanes=4,
)
LENGTH_TOKENS = 16


def _batches() -> list[Sequences]:
    """Every second batch holds isolated documents, which end inside the ranks' shards."""
    generator = torch.Generator().manual_seed(7)
    tokens = [torch.randint(SHAPE.vocab, (2, LENGTH_TOKENS), generator=generator) for _ in range(4)]
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in (3, 7, 1, 5)]).expand(2, -1)
    return [Sequences(batch, positions if index % 2 == 0 else None) for index, batch in enumerate(tokens)]


def _estimate(layout: Layout) -> dict[str, Any]:
    """Score the parent on this rank's share of the batches, and run one subnet."""
    use_cpu_backend()
    groups = join_world(layout, torch.device("cpu")).groups
    model = build_model(SPACE, layout, init_std=0.3)
    batches = _batches()
    own = batches[groups.dp.rank() :: groups.dp.size()]
    scores = collect_scores(model, SPACE, own)
    iterative, one_shot = (rank_layers(model, SPACE, own, method) for method in ("iterative", "one_shot"))
    magnitude, cosine = magnitude_scores(model, SHAPE), rank_by_cosine(model, own)
    subnet = Gates.slice(SPACE.subnet({Axis.HIDDEN: (1,), Axis.MAMBA_CHANNEL: (1,), Axis.DEPTH: (1,)}))
    tensors = scores.tensors() | {f"iterative.{name}": score for name, score in iterative.tensors().items()}
    tensors |= {f"one_shot.{name}": score for name, score in one_shot.tensors().items()}
    tensors |= {f"magnitude.{name}": score for name, score in magnitude.tensors().items()}
    return {
        "tensors": tensors | {"cosine": cosine.tensors()["depth"]},
        "num_tokens": scores.num_tokens,
        "rankings": [make_ranking(*of) for of in ((scores, SPACE, iterative), (magnitude, SPACE, one_shot))],
        "hidden": forward_hidden(model, batches[0].tokens, subnet, positions=batches[0].positions),
        "place": (groups.tp.rank(), groups.pp.rank(), groups.cp.rank()),
    }


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return run_distributed(_estimate, 1, Layout())[0]


LAYOUTS = {
    "TP2": (2, Layout(tensor=2)),
    "TP2+SP": (2, Layout(tensor=2, sequence=True)),
    "PP2": (2, Layout(pipeline=2)),
    "DP2": (2, Layout()),
    "CP2": (2, Layout(context=2)),
    "TP2xPP2+SP": (4, Layout(tensor=2, pipeline=2, sequence=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pitfall_22_scores_and_rankings_do_not_depend_on_the_layout(one_process: dict[str, Any], name: str) -> None:
    world_size, layout = LAYOUTS[name]
    ranks = run_distributed(_estimate, world_size, layout)
    for rank in ranks:
        assert rank["num_tokens"] == one_process["num_tokens"] == 4 * 2 * LENGTH_TOKENS
        assert rank["tensors"].keys() == one_process["tensors"].keys()
        for score, expected in one_process["tensors"].items():
            torch.testing.assert_close(rank["tensors"][score], expected, rtol=1e-5, atol=0, equal_nan=True, msg=score)
            same = torch.equal(rank["tensors"][score].nan_to_num(), ranks[0]["tensors"][score].nan_to_num())
            assert same, f"{score} has other bits on another rank"
        assert rank["rankings"] == one_process["rankings"]
    _check_hidden(ranks, layout, one_process["hidden"])


def _check_hidden(ranks: list[dict[str, Any]], layout: Layout, expected: Tensor) -> None:
    """Compare each last-stage rank's final hidden states [S(/tp), B, d] with its tokens of the one-process run."""
    for rank in ranks:
        tp, pp, cp = rank["place"]
        if pp < layout.pipeline - 1:
            assert rank["hidden"] is None
            continue
        part = context_parallel_slice(expected.transpose(0, 1), cp, layout.context).transpose(0, 1)
        if layout.sequence:
            part = part.chunk(layout.tensor)[tp]
        torch.testing.assert_close(rank["hidden"], part, rtol=1e-4, atol=1e-5)


def test_context_parallel_ranks_share_the_sequence_evenly_under_a_causal_mask() -> None:
    tokens = torch.arange(24).view(2, 12)
    assert context_parallel_slice(tokens, 0, 3)[0].tolist() == [0, 1, 10, 11]
    assert context_parallel_slice(tokens, 2, 3)[1].tolist() == [16, 17, 18, 19]
    assert context_parallel_slice(tokens, 0, 1) is tokens
    with pytest.raises(SequenceLengthError, match=r"multiple of 2 x parallel\.context = 8, nearest legal is 16"):
        context_parallel_slice(tokens, 0, 4)


def _permute(values: dict[str, Any]) -> None:
    run_importance(load(ImportanceConfig, values), Console(quiet=True))


@pytest.mark.parametrize(("method", "depth"), [("magnitude", "cosine"), ("random", "last_first")])
def test_rankings_to_compare_with_permute_the_parent_without_moving_it(start: Path, method: str, depth: str) -> None:
    """The verb itself compares the logits before it writes."""
    importance = dict(num_sequences=4, sequence_length=32, micro_batch=4, depth_sequences=4, method=method, depth=depth)
    parent, data = dict(parent=str(start / "run" / "parent")), dict(path=str(start / "data"))
    values = dict(init_from=parent, data=data, importance=importance, exp_manager=place(start, method))
    run_distributed(_permute, 1, values)
    record = Record.read(resolve_checkpoint(str(start / "run" / method)))
    ranked = tuple(range(len(record.depth_ranking)))
    assert record.kind == "permuted_parent" and (record.depth_ranking == ranked) == (depth == "last_first")


def _permute_wrongly(values: dict[str, Any]) -> None:
    """Run the importance verb with a permutation that reorders FFN rows but not the columns that read them."""

    def wrong(tensor: Tensor, name: str, *_: Any) -> Tensor:
        return tensor.flip(0) if name.endswith("linear_fc1.weight") else tensor

    with mock.patch("elastic.verbs.estimate_importance.permute_parameter", wrong):
        run_importance(load(ImportanceConfig, values), Console(quiet=True))


def test_a_permutation_that_moves_the_logits_writes_no_checkpoint(start: Path) -> None:
    values = dict(
        init_from=dict(parent=str(start / "run" / "parent")),
        data=dict(path=str(start / "data")),
        importance=dict(num_sequences=4, sequence_length=32, micro_batch=4, depth="none"),
        exp_manager=place(start, "wrong"),
    )
    with pytest.raises(Exception, match="logits of the permuted parent moved") as refused:
        run_distributed(_permute_wrongly, 1, values)
    assert isinstance(refused.value.__cause__, PermutationError)
    left = [path.name for path in (start / "run" / "wrong").iterdir()]
    assert left == ["config.json"], "no checkpoint, no ranking, and nothing that blocks the corrected command"
