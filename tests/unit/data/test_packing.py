"""Packing whole documents: each once an epoch, none split without need, nothing from one counted in another."""

from collections import Counter
from io import StringIO
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from elastic.config.load import load
from elastic.config.sections import LongDocuments
from elastic.config.verbs import ElasticConfig
from elastic.corpus.prepare import PrepareConfig, prepare
from elastic.data.held_out import HeldOut, validation_batches
from elastic.data.manifest import DataError
from elastic.data.packing import best_fit, document_bounds, pack
from elastic.data.stream import PADDING_SAMPLE, Concatenated, Isolated, PhaseData, read_batch, samples_of
from elastic.data.tokens import TokenStream
from elastic.router.phases import Moment, Phase
from elastic.verbs.prepare_data import run_prepare
from elastic.verbs.text import length_problems
from tests.unit.config.configs import put, values_of
from tests.unit.data.chatting import CHATML, chat_config, conversations, unmarked, write_chats, write_tokenizer
from tests.unit.data.preparing import write_jsonl

S = 64


def bounds_of(lengths: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])


def plain_best_fit(lengths: list[int], sequence_length: int) -> list[int]:
    """Return the rooms left by the textbook's best fit decreasing, one document at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else sequence_length) - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(30))
def test_a_histogram_is_packed_as_document_by_document(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 40))
    lengths = generator.integers(1, size + 1, int(generator.integers(1, 300))).tolist()
    rooms: dict[int, int] = {}
    for first, number, pieces in _with_lengths(best_fit(np.bincount(lengths, minlength=size + 1).tolist()), lengths):
        for sequence in range(first, first + number):
            rooms[sequence] = rooms.get(sequence, size) - pieces
    assert sorted(rooms) == list(range(len(rooms))) and sorted(rooms.values()) == plain_best_fit(lengths, size)


def _with_lengths(placed: list[tuple[int, int, int]], lengths: list[int]) -> list[tuple[int, int, int]]:
    """Turn numbers of pieces into the places they take: pieces are placed from the longest down."""
    descending, taken, filled = sorted(lengths, reverse=True), 0, []
    for first, number, pieces in placed:
        here = set(descending[taken : taken + number * pieces])
        assert len(here) == 1, "pieces placed together are of one length"
        filled.append((first, number, pieces * here.pop()))
        taken += number * pieces
    assert taken == len(lengths)
    return filled


LENGTHS = {
    "mixed": [1, 2, 3, S - 1, S, S + 1, S + 2, 2 * S, 2 * S + 1, 2 * S + 2, 5 * S + 7, 17, 17, 17, 40],
    "single tokens among others": [1, 1, 9, 1],
    "a whole sequence and its last label": [S + 1],
    "all equal": [12] * 100,
    "all longer": [3 * S] * 7,
    "two tokens": [2] * (2 * S + 1),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("long_documents", ["cut", "leave_out"])
def test_every_token_but_a_documents_first_is_a_label_once(name: str, long_documents: LongDocuments) -> None:
    lengths = LENGTHS[name]
    bounds = bounds_of(lengths)
    kept = [n for n in lengths if 1 < n <= S + 1 or (n > 1 and long_documents == "cut")]
    packing = pack(bounds, S, 0, long_documents)
    labels = Counter[int]()
    for sequence in range(len(packing)):
        pieces = packing.pieces(sequence)
        assert 1 <= sum(length for _, length in pieces) <= S
        for start, length in pieces:
            document = int(np.searchsorted(bounds, start, side="right")) - 1
            assert length >= 1 and start + length < bounds[document + 1]  # its labels are tokens of its own document
            assert (start - bounds[document]) % S == 0
            labels.update(range(start + 1, start + length + 1))
    expected = [t for a, n in zip(bounds, lengths, strict=False) if n in kept for t in range(a + 1, a + n)]
    assert labels == dict.fromkeys(expected, 1)
    assert packing.num_bare == lengths.count(1) and packing.num_long == sum(n > S + 1 for n in lengths)
    assert packing.num_documents == len(kept)
    assert packing.fill == pytest.approx(len(expected) / max(1, len(packing) * S), abs=1e-12)
    said = f"{len(kept)} documents in {len(packing)} sequences of {S} tokens"
    done = "cut" if long_documents == "cut" else "left out"
    assert str(packing).startswith(said) and (f"{packing.num_long} longer ones {done}" in str(packing)) == bool(
        packing.num_long
    )


def test_seeds_mix_documents_of_one_length_and_nothing_else_decides() -> None:
    bounds = bounds_of(np.random.default_rng(0).integers(2, S, 2000))
    one, same, other = (pack(bounds, S, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.starts, same.starts) and np.array_equal(one.first_piece, same.first_piece)
    assert np.array_equal(one.lengths, other.lengths) and not np.array_equal(one.starts, other.starts)
    # Pinned: a resumed run on a later version must read the same samples.
    packing = pack(bounds_of([9, 30, 9, 9, 40, 70, 22, 9]), 32, seed=7)
    starts = [[97], [129], [57], [9], [167, 39], [0, 189, 48, 89], [161]]
    assert [[start for start, _ in packing.pieces(sequence)] for sequence in range(len(packing))] == starts


@pytest.mark.parametrize("sequence_length", [2048, 8192, 49152])
def test_lengths_like_those_of_chats_fill_more_than_98_percent(sequence_length: int) -> None:
    lengths = np.random.default_rng(5).lognormal(7.0, 1.1, 20_000).astype(np.int64) + 2  # mean 2,000, median 1,100
    packing = pack(bounds_of(lengths), sequence_length, 0)
    assert packing.fill > 0.995
    assert int(packing.lengths.sum()) == int((lengths - 1).sum())


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    source = write_chats(folder / "chats.jsonl", conversations("chatml", 120))
    tokenizer = write_tokenizer(folder, unmarked(CHATML))
    return prepare(chat_config(folder, source, tokenizer, validation_ratio=0.3)).folder


def test_rows_hold_whole_conversations_with_their_masks(chats: Path) -> None:
    stream = TokenStream(chats / "train")
    bounds = document_bounds(chats / "train.idx")
    samples = Isolated(stream, S, seed=3)
    for epoch in range(2):
        found = Counter[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]]()
        for index in range(len(samples)):
            row = samples.row(epoch * len(samples) + index)
            assert row.counted is not None and row.positions is not None
            pieces = samples.packing.pieces(samples.order.chunk(epoch * len(samples) + index))
            full = sum(length for _, length in pieces)
            begins = [*(row.positions == 0).nonzero().flatten().tolist(), S]
            assert begins[: len(pieces) + 1] == [0, *accumulate(length for _, length in pieces)]
            for begin, end in pairwise(begins):
                assert row.positions[begin:end].tolist() == list(range(end - begin))
                piece = (tuple(part[begin:end].tolist()) for part in (row.tokens, row.labels, row.counted))
                if end <= full:
                    found[next(piece), next(piece), next(piece)] += 1
            assert not row.counted[full:].any()  # what is left over repeats the row
            for part in (row.tokens, row.labels, row.positions):
                assert part[full:].equal(part.narrow(0, 0, full).repeat(S)[: S - full])
        expected = Counter[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]]()
        for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            for start in range(first, end - 1, S):
                length = min(S, end - 1 - start)
                tokens, counted = stream.read(start, length + 1).tolist(), stream.counted(start + 1, length).tolist()
                expected[tuple(tokens[:-1]), tuple(tokens[1:]), tuple(counted)] += 1
        assert found == expected
        assert samples.packing.fill > 0.9  # of 80 short conversations
    steps = PhaseData([samples], micro_batch_size=1, world=None)  # type: ignore[arg-type]  # no batch is read
    epoch = Moment(0, 0, Phase(name="one", sequence_length=S, global_batch=len(samples), steps=1), 0)
    assert steps.fill(epoch) == pytest.approx(samples.packing.fill)
    whole = PhaseData([Concatenated(stream, S, seed=3)], micro_batch_size=1, world=None)  # type: ignore[arg-type]
    assert whole.fill(epoch) is None


@pytest.mark.parametrize(("data_parallel_size", "micro_batch_size"), [(1, 2), (2, 1), (4, 2)])
def test_a_step_reads_the_same_rows_at_every_layout_and_after_every_interruption(
    chats: Path, data_parallel_size: int, micro_batch_size: int
) -> None:
    stream = TokenStream(chats / "train")
    samples = Isolated(stream, S, seed=5, salt=1)
    consumed, seen = 0, Counter[int]()
    while consumed < 2 * len(samples):
        again = Isolated(TokenStream(chats / "train"), S, seed=5, salt=1)
        for number in range(8 // micro_batch_size):
            rank, index = number % data_parallel_size, number // data_parallel_size
            batch = read_batch(again, consumed, index, rank, data_parallel_size, micro_batch_size)
            assert batch.positions is not None and batch.counted is not None and not batch.counts_all
            for place, sample in enumerate(batch.sample_ids.tolist()):
                row = samples.row(sample)
                seen[samples.order.chunk(sample)] += sample < 2 * len(samples)
                assert row.counted is not None and batch.counted[place].equal(row.counted)
                assert row.positions is not None and batch.positions[place].equal(row.positions)
                assert batch.tokens[place].equal(row.tokens) and batch.labels[place].equal(row.labels)
            assert batch.token_weights().sum() == batch.num_counted() == batch.counted.sum()
        consumed += 8
    assert seen == dict.fromkeys(range(len(samples)), 2)


def test_an_index_that_is_none_or_does_not_fit_is_refused(chats: Path, tmp_path: Path) -> None:
    index = (chats / "train.idx").read_bytes()
    for content, rule in ((b"nothing", "is no index"), (index[:-1], "is cut off"), (index[:33], "is no index")):
        (tmp_path / "train.idx").write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.idx: {rule}.*prepare the data again"):
            document_bounds(tmp_path / "train.idx")
    assert torch.equal(torch.from_numpy(document_bounds(chats / "train.idx"))[:1], torch.zeros(1, dtype=torch.int64))


def test_held_out_documents_are_packed_within_their_source_and_read_alike_at_every_layout(tmp_path: Path) -> None:
    for name, size in (("prose", 60), ("code", 25)):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {index} " + "again " * (index % 9) for index in range(size)])
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("prose", "code")]
    folder = tmp_path / "data"
    prepare(PrepareConfig(paths, "jsonl", output_dir=str(folder), vocab_size=300, validation_ratio=0.5))
    stream = TokenStream(folder / "validation", "isolated")
    held_out, bounds = HeldOut(stream, S), stream.bounds()
    ends = np.cumsum(list(stream.manifest.splits["validation"].sources.values()))
    everything = held_out.spread(len(held_out))
    for (source, places), end in zip(everything.items(), ends, strict=True):
        rows = [held_out.row(place) for place in places]
        begin = end - stream.manifest.splits["validation"].sources[source]
        inside = [n - 1 for a, n in zip(bounds[:-1], np.diff(bounds), strict=True) if begin <= a < end]
        assert sum(int(row.counted.sum()) for row in rows if row.counted is not None) == sum(inside)
        tokens = Counter(stream.read(begin, end - begin).tolist())
        labels = Counter(torch.cat([row.labels[row.counted] for row in rows]).tolist())
        assert labels <= tokens and tokens.total() - labels.total() == len(inside)  # all but the first of each
    found = []
    for size, batch_size in ((1, 1), (2, 1), (1, 4), (4, 2)):
        every = [b for rank in range(size) for b in validation_batches(held_out, len(held_out), rank, size, batch_size)]
        weights = sum(batch.token_weights().sum().item() for _, batch in every)
        ids = sorted(number for _, batch in every for number in batch.sample_ids.tolist() if number != PADDING_SAMPLE)
        found.append((weights, ids))
    labels_in_all = stream.num_tokens - stream.manifest.splits["validation"].num_documents
    assert found == [(labels_in_all, list(range(len(held_out))))] * 4


def test_nothing_to_pack_is_refused_with_what_there_is(tmp_path: Path, chats: Path) -> None:
    with pytest.raises(
        DataError, match=r"sequence_length = 2: .*train: 0 documents in 0 sequences .*left out; set data"
    ):
        samples_of(TokenStream(chats / "train", "isolated", "leave_out"), 2, seed=0)
    assert isinstance(samples_of(TokenStream(chats / "train"), 16, seed=0), Isolated)  # as chats are, if nobody says
    assert isinstance(samples_of(TokenStream(chats / "train", "concatenated"), 16, seed=0), Concatenated)


def test_what_is_too_long_or_too_few_is_said_before_anything_starts(chats: Path) -> None:
    there = len(HeldOut(TokenStream(chats / "validation"), S))
    data = dict(path=str(chats), packing=None, validation_sequences=there + 1)
    lengths = {"curriculum.0.sequence_length": S, "curriculum.1.sequence_length": S}
    values = values_of(ElasticConfig, lengths | {f"data.{name}": value for name, value in data.items()})
    (problem,) = length_problems(load(ElasticConfig, values))
    assert str(problem).endswith(
        f"the held-out split has {there} sequences of {S} tokens; nearest legal value is {there}"
    )
    put(values, "data.validation_sequences", 1)
    assert list(length_problems(load(ElasticConfig, values))) == []
    put(values, "data.long_documents", "leave_out")
    put(values, "curriculum.0.sequence_length", 2)
    problem, *_ = length_problems(load(ElasticConfig, values))
    assert str(problem) == (
        f"curriculum.0.sequence_length = 2: no document in the training split of {chats} fits into a sequence; set "
        "data.long_documents=cut, or give documents of two tokens and more"
    )
    put(values, "data.packing", "concatenated")
    assert not [problem for problem in length_problems(load(ElasticConfig, values)) if "curriculum" in problem.field]


def test_preparing_chats_says_how_full_sequences_would_be(chats: Path) -> None:
    screen, folder = StringIO(), chats.parent
    config = chat_config(folder, folder / "chats.jsonl", folder, validation_ratio=0.3)
    run_prepare(config, Console(file=screen, width=300))
    packing = pack(document_bounds(chats / "train.idx"), 4096, 0)
    assert f"packed: {packing}\n" in screen.getvalue() and "16,384" not in screen.getvalue()
