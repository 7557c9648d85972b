"""A batch of prompts writes what each writes alone, whatever their lengths: in fp64, against masks without caches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from elastic.generate.batch import Decoder, End
from elastic.generate.sampling import Sampling
from elastic.generate.text import Generation, Marker, ThinkPlan, batches_by_length, generate, generate_batch
from elastic.model.model import ElasticModel
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.shape import Subnet
from elastic.space.space import Space
from tests.parity.model_factory import SPACES, build_lively, logits_of, one_hot_weights, one_process, relative_error
from tests.shapes import random_choice

# Shorter than the convolution, around chunks of four, twice the same length, one token and the longest.
PROMPTS: tuple[list[int], ...] = (
    [7],
    [5, 60, 33, 2, 2, 41],
    [11, 3, 58, 20, 9, 9, 9, 14, 0, 27, 36, 1, 8],
    [4, 4],
    [1, 2, 3, 4, 5, 6],
    [50, 3, 12, 17],
)
NEW_TOKENS = 7
DRAWN = dict(temperature=1.3, top_k=30, top_p=0.95, seed=4)
NAMES = ("four groups, five queries per KV head, depth 10", "Mamba heads per layer", "no attention", "no Mamba")


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


@dataclass(frozen=True)
class Subject:
    space: Space
    model: ElasticModel
    choice: dict[Axis, tuple[int, ...]]

    @property
    def subnet(self) -> Subnet:
        return self.space.subnet(self.choice)


def subject(name: str) -> Subject:
    space = SPACES[name]
    choice = random_choice(space, torch.Generator().manual_seed(5))
    model = build_lively(space).eval().double()
    model.config.params_dtype = torch.float64  # what a decoder makes its caches of
    return Subject(space, model, choice)


@pytest.fixture(scope="module", params=NAMES)
def one(request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


def by_masks(of: Subject, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """Write on at full size under masks, reading the whole text again for each token."""
    gates, text = Gates.mask(one_hot_weights(of.space, of.choice, torch.float64)), list(prompt)
    with torch.no_grad():
        for position in range(len(prompt), len(prompt) + NEW_TOKENS):
            text.append(sampling.choose(logits_of(of.model, torch.tensor([text]), gates)[0, -1].float(), position))
    return text[len(prompt) :]


def batch(of: Subject, plan: Any, samplings: Sequence[Sampling], *more: Any, **named: Any) -> list[Generation]:
    return generate_batch(of.model, plan, PROMPTS, samplings, NEW_TOKENS, *more, **named)


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_writes_what_masks_write_alone(drawn: dict[str, Any], one: Subject) -> None:
    samplings = [Sampling(**drawn, text=number) for number in range(len(PROMPTS))]
    together = [text.tokens for text in batch(one, one.subnet, samplings)]
    alone = [tuple(by_masks(one, *each)) for each in zip(PROMPTS, samplings, strict=True)]
    assert together == alone
    assert len(set(together)) > 3, "the test would pass for one text"
    assert [generate(one.model, one.subnet, PROMPTS[2], samplings[2], NEW_TOKENS).tokens] == [together[2]]


def test_texts_that_end_leave_the_others_alone(one: Subject) -> None:
    """Ends and stops come at different times; the caches of who is left are moved together."""
    samplings = [Sampling(**DRAWN, text=number) for number in range(len(PROMPTS))]
    whole = [list(text.tokens) for text in batch(one, one.subnet, samplings)]
    ends, seen = frozenset({whole[1][3], whole[4][0]}), [list[int]() for _ in PROMPTS]
    stop = whole[2][5]
    texts = batch(one, one.subnet, samplings, ends, [own.append for own in seen], stop=lambda new: new[-1] == stop)
    for text, expected, own in zip(texts, whole, seen, strict=True):
        last = next((place for place, token in enumerate(expected) if token in {*ends, stop}), NEW_TOKENS - 1)
        assert list(text.tokens) == own == expected[: last + 1]
        why = End.EOS if expected[last] in ends else End.STOP if expected[last] == stop else End.LENGTH
        assert text.end is why
    assert len({len(text.tokens) for text in texts}) > 2


@pytest.mark.parametrize("answer", ["other", "same"])
def test_thinking_switches_each_text_at_its_own_time(answer: str, one: Subject) -> None:
    samplings = [Sampling(text=number) for number in range(len(PROMPTS))]
    thought = [text.tokens for text in batch(one, one.subnet, samplings)]
    letter = chr(ord("A") + thought[1][2])
    marker = Marker(letter, (40, 41), lambda tokens: "".join(chr(ord("A") + token) for token in tokens))
    plan = ThinkPlan(one.subnet, one.subnet if answer == "same" else Subnet.full(one.space.parent), marker, 5)
    ends = frozenset({thought[3][1]} - {thought[1][2]})
    alone = [generate(one.model, plan, *each, NEW_TOKENS, ends) for each in zip(PROMPTS, samplings, strict=True)]
    together = batch(one, plan, samplings, ends)

    def kept(text: Generation) -> tuple[Any, ...]:
        counts = [(part.read_tokens, part.new_tokens, part.steps) for part in text.parts]
        return text.tokens, text.end, text.switch, text.forced_marker, counts

    assert [kept(text) for text in together] == [kept(text) for text in alone]
    assert len({text.switch for text in together}) > 1


def test_fillers_leave_no_trace_in_uneven_pieces(one: Subject) -> None:
    """Logits after pieces of any length, of none for some rows, equal those of a sequence alone to 1e-12."""
    pieces: list[list[list[int]]] = [
        [[1, 2, 3, 4, 5], [6], [7, 8]],
        [[9], [], [10, 11, 12]],
        [[], [13, 14, 15, 16, 17, 18], [19]],
        [[20], [21], [22]],
    ]
    together = Decoder(one.model, one.subnet, 20, batch=3)
    found = [together.feed(piece) for piece in pieces]
    for row in range(3):
        alone = Decoder(one.model, one.subnet, 20)
        for piece, logits in zip(pieces, found, strict=True):
            if piece[row]:
                assert relative_error(logits[row], alone.feed([piece[row]])[0]) <= 2e-7  # fp32 is what is handed out
        assert together.cache.lengths[row] == sum(len(piece[row]) for piece in pieces)
        for index, layer in together.cache.layers.items():
            for name, tensor in vars(layer).items():
                own = vars(alone.cache.layers[index])[name][0]
                assert relative_error(tensor[row], own) <= 1e-12, (index, name)


def test_batches_hold_like_lengths_longest_first() -> None:
    assert batches_by_length([3, 9, 3, 1, 9], 2) == [[1, 4], [0, 2], [3]]
    assert batches_by_length([2], 8) == [[0]] and batches_by_length([], 8) == []
