"""Documents packed into one sequence do not see each other: every one is computed as if it were alone."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from elastic.model.model import ElasticModel
from elastic.space.gates import Gates
from elastic.world.groups import Layout, Recompute
from tests.parity.model_factory import (
    SPACES,
    build_lively,
    choices_to_test,
    logits_of,
    one_hot_weights,
    one_process,
    outcome_of,
    relative_error,
    soft_weights,
    tokens_for,
)

BOUND, LEAK = 1e-9, 1e-12
# Lengths of the documents of two rows; the scan's chunks end after 4 and 8 tokens, the convolutions reach over 3 or 2.
EDGES = "on and beside the chunks' edges"
PACKED = {
    EDGES: ([4, 4, 3], [3, 1, 4, 2, 1]),
    "shorter than the taps, and one alone": ([2, 1, 2, 1, 5], [11]),
    "of one token each": ([1] * 11, [9, 2]),
}


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def positions_of(*rows: list[int]) -> Tensor:
    """Return each token's place in its document from the documents' lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows]).int()


def packed_logits(model: ElasticModel, tokens: Tensor, gates: Gates | None, rows: tuple[list[int], ...]) -> Tensor:
    """Return logits [B, S, V] of the packed rows."""
    hidden = model(tokens, gates, positions=positions_of(*rows))
    return (hidden @ model.head_weight(gates).T).transpose(0, 1)


def logits_alone(model: ElasticModel, tokens: Tensor, gates: Gates | None, rows: tuple[list[int], ...]) -> Tensor:
    """Return the same, of documents that stand alone in their rows; those of one length are rows of one batch."""
    pieces = [piece for row, lengths in zip(tokens, rows, strict=True) for piece in row.split(lengths)]
    found: list[Tensor] = [torch.empty(0)] * len(pieces)
    for length in {len(piece) for piece in pieces}:
        alike = [number for number, piece in enumerate(pieces) if len(piece) == length]
        batch = logits_of(model, torch.stack([pieces[number] for number in alike]), gates)
        for number, logits in zip(alike, batch, strict=True):
            found[number] = logits
    return torch.cat(found).unflatten(0, tokens.shape)


def executions(model: ElasticModel) -> Iterator[tuple[Gates | None, Mapping[str, Tensor]]]:
    """Yield the parent, soft and one-hot masks and a slice, each with the leaves of its gates."""
    space, choice = model.decoder.masks.space, choices_to_test(model.decoder.masks.space, count=1)[1]
    yield None, {}
    for weights in (soft_weights(space, 3, torch.float64), one_hot_weights(space, choice, torch.float64)):
        yield Gates.mask(weights), {f"gate {axis}": weight for axis, weight in weights.items()}
    yield Gates.slice(space.subnet(choice)), {}


@pytest.mark.parametrize("name", ["two groups, depth 7", "four groups, five queries per KV head, depth 10"])
@pytest.mark.parametrize(
    ("recompute", "packed"), [*(("none", packed) for packed in PACKED), ("full", EDGES), ("selective", EDGES)]
)
def test_a_packed_document_is_computed_as_if_alone(name: str, recompute: Recompute, packed: str) -> None:
    """Logits, and the gradients of all weights and gates."""
    model = build_lively(SPACES[name], Layout(dtype=torch.float64, recompute=recompute))
    tokens, rows = tokens_for(SPACES[name].parent), PACKED[packed]
    for gates, gate_leaves in executions(model):
        leaves = {**dict(model.named_parameters()), **gate_leaves}
        found, expected = (outcome_of(of(model, tokens, gates, rows), leaves) for of in (packed_logits, logits_alone))
        assert relative_error(found.logits, expected.logits) <= BOUND
        for leaf, gradient in expected.gradients.items():
            assert relative_error(found.gradients[leaf], gradient) <= BOUND, leaf


@pytest.mark.parametrize("name", SPACES)
def test_pitfall_26_nothing_leaks_from_document_to_document(name: str) -> None:
    """Another document in front moves no logit; in the same document it would, which shows that the test can see."""
    model, lengths = build_lively(SPACES[name], Layout(dtype=torch.float64)), [5, 6]
    tokens = tokens_for(SPACES[name].parent, batch=1)
    changed = tokens.clone()
    changed[:, :5] = (changed[:, :5] + 1) % SPACES[name].parent.vocab
    one, other = (packed_logits(model, t, None, (lengths,)) for t in (tokens, changed))
    assert (one - other)[:, 5:].abs().max() <= LEAK < (one - other)[:, :5].abs().max()
    concatenated, moved = (logits_of(model, t, None) for t in (tokens, changed))
    assert (concatenated - moved)[:, 5:].abs().max() > LEAK


def test_a_row_of_one_document_is_the_plain_sequence() -> None:
    space = SPACES["two groups, depth 7"]
    model, tokens = build_lively(space), tokens_for(space.parent)
    plain = logits_of(model, tokens, None)
    assert packed_logits(model, tokens, None, ([11], [11])).equal(plain)
    beside_another = packed_logits(model, tokens, None, ([11], [5, 6]))
    torch.testing.assert_close(beside_another[0], plain[0])
