"""Reading prepared tokens: every token once per epoch, the same samples at every layout."""

import math
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic.corpus.prepare import PrepareConfig, prepare
from elastic.data.held_out import HeldOut, source_labels, validation_batches
from elastic.data.manifest import DataError
from elastic.data.order import SampleOrder, mixed_seed
from elastic.data.stream import PADDING_SAMPLE, Batch, Concatenated, read_batch
from elastic.data.tokenizer import load_tokenizer
from elastic.data.tokens import TokenStream

S = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [f"line {number} says {number * number}, or {'again ' * (number % 7)}" for number in range(300)]
    (folder / "lines.txt").write_text("\n".join(lines))
    output = folder / "prepared"
    settings = PrepareConfig(
        output_dir=str(output),
        paths=[str(folder / "lines.txt")],
        document_format="lines",
        vocab_size=300,
        validation_ratio=0.3,
    )
    prepare(settings)
    return output


@pytest.fixture
def stream(prepared: Path) -> TokenStream:
    return TokenStream(prepared / "train")


def ids(batches: list[Batch]) -> list[int]:
    return [sample_id for batch in batches for sample_id in batch.sample_ids.tolist()]


# Order


@pytest.mark.parametrize("num_chunks", [*range(1, 40), 97, 1000, 4097])
def test_every_epoch_visits_every_chunk_once(num_chunks: int) -> None:
    order = SampleOrder(num_chunks, seed=3)
    for epoch in range(3):
        visited = [order.chunk(epoch * num_chunks + place) for place in range(num_chunks)]
        assert sorted(visited) == list(range(num_chunks))


def test_epochs_seeds_and_salts_have_unrelated_orders() -> None:
    def first_thousand(seed: int, epoch: int = 0) -> np.ndarray:
        order = SampleOrder(1000, seed)
        return np.array([order.chunk(epoch * 1000 + place) for place in range(1000)])

    orders = [np.arange(1000), first_thousand(1), first_thousand(2), first_thousand(1, epoch=1)]
    orders += [first_thousand(mixed_seed(1, 0, S)), first_thousand(mixed_seed(1, 1, S))]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.12  # about 4 standard deviations
            assert np.mean(one == other) < 0.01


@pytest.mark.parametrize("num_chunks", [5, 12])
def test_every_chunk_is_equally_likely_at_every_place(num_chunks: int) -> None:
    order = SampleOrder(num_chunks, seed=0)
    epochs = 4000
    counts = np.zeros((num_chunks, num_chunks))
    for index in range(epochs * num_chunks):
        counts[index % num_chunks, order.chunk(index)] += 1
    expected = epochs / num_chunks
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (num_chunks - 1) ** 2
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_order_of_a_huge_corpus_needs_no_table_and_never_changes() -> None:
    order = SampleOrder(10**12, seed=7)
    assert len({order.chunk(index) for index in range(1000)}) == 1000
    # Pinned: a resumed run on a later version must read the same samples.
    assert [SampleOrder(1000, seed=7).chunk(index) for index in (0, 1, 999, 1000)] == [989, 919, 36, 892]


# Chunks


def test_every_token_but_the_first_is_a_label_once_an_epoch(stream: TokenStream) -> None:
    dataset = Concatenated(stream, S, seed=1)
    whole = stream.read(0, stream.num_tokens)
    chunk_of = {dataset.order.chunk(index): dataset.row(index) for index in range(len(dataset))}
    assert len(dataset) == (stream.num_tokens - 1) // S
    labels = torch.cat([chunk_of[chunk].labels for chunk in range(len(dataset))])
    tokens = torch.cat([chunk_of[chunk].tokens for chunk in range(len(dataset))])
    assert labels.equal(whole[1 : len(dataset) * S + 1])
    assert tokens.equal(whole[: len(dataset) * S])
    assert labels.dtype == torch.int64


def test_phases_and_lengths_read_in_orders_of_their_own(stream: TokenStream) -> None:
    def chunks(length: int, salt: int) -> list[int]:
        dataset = Concatenated(stream, length, seed=1, salt=salt)
        return [dataset.order.chunk(index) for index in range(20)]

    assert chunks(S, 0) == chunks(S, 0)
    assert chunks(S, 0) != chunks(S, 1)
    # The same chunk count at another length still has another order.
    longer = S + 1
    while (stream.num_tokens - 1) // longer != (stream.num_tokens - 1) // (longer - 1):
        longer += 1
    assert chunks(longer, 0) != chunks(longer - 1, 0)


def test_sequence_longer_than_the_data_is_refused_with_the_longest_legal(stream: TokenStream) -> None:
    assert len(Concatenated(stream, stream.num_tokens - 1, seed=0)) == 1
    for length in (0, stream.num_tokens):
        nearest = max(1, min(length, stream.num_tokens - 1))
        with pytest.raises(DataError, match=rf"sequence_length = {length}: .* nearest legal {nearest}$"):
            Concatenated(stream, length, seed=0)


# Micro-batches


def step(
    dataset: Concatenated, consumed: int, global_batch: int, data_parallel_size: int, micro_batch_size: int
) -> list[Batch]:
    """Return all micro-batches of one step on all ranks."""
    num_micro_batches = global_batch // (data_parallel_size * micro_batch_size)
    return [
        read_batch(dataset, consumed, index, rank, data_parallel_size, micro_batch_size)
        for rank in range(data_parallel_size)
        for index in range(num_micro_batches)
    ]


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_step_reads_the_same_samples_at_every_layout(
    stream: TokenStream, data_parallel_size: int, micro_batch_size: int
) -> None:
    dataset = Concatenated(stream, S, seed=5)
    batches = step(dataset, 24, 8, data_parallel_size, micro_batch_size)
    assert sorted(ids(batches)) == list(range(24, 32))
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == (micro_batch_size, S)
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            sample = dataset.row(sample_id)
            assert batch.tokens[row].equal(sample.tokens) and batch.labels[row].equal(sample.labels)
            assert batch.labels[row, :-1].equal(batch.tokens[row, 1:])
        assert batch.token_weights().equal(torch.ones(micro_batch_size, S))


def test_every_sample_is_read_once_over_interruptions_and_changes_of_layout(prepared: Path) -> None:
    consumed, seen = 0, Counter[int]()
    chunks = Counter[int]()
    layouts = [(8, 1, 2), (8, 2, 1), (12, 2, 3), (8, 1, 8), (4, 4, 1)]
    length = len(Concatenated(TokenStream(prepared / "train"), S, seed=5))
    while consumed < 2 * length:
        dataset = Concatenated(TokenStream(prepared / "train"), S, seed=5)  # a new process knows only `consumed`
        global_batch, *layout = layouts[consumed % len(layouts)]
        batches = step(dataset, consumed, global_batch, *layout)
        seen.update(ids(batches))
        chunks.update(dataset.order.chunk(sample_id) for sample_id in ids(batches) if sample_id < 2 * length)
        consumed += global_batch
    assert seen == Counter(range(consumed))
    assert chunks == dict.fromkeys(range(length), 2)


# Validation


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_validation_is_the_same_set_with_equal_steps_at_every_layout(
    prepared: Path, data_parallel_size: int, micro_batch_size: int
) -> None:
    held_out = HeldOut(TokenStream(prepared / "validation"), S)
    ranks = [
        [batch for _, batch in validation_batches(held_out, 13, rank, data_parallel_size, micro_batch_size)]
        for rank in range(data_parallel_size)
    ]
    expected_steps = math.ceil(13 / (data_parallel_size * micro_batch_size))
    assert [len(batches) for batches in ranks] == [expected_steps] * data_parallel_size
    batches = [batch for batches in ranks for batch in batches]
    (starts,) = held_out.spread(13).values()
    assert sorted(number for number in ids(batches) if number != PADDING_SAMPLE) == starts
    assert sum(batch.token_weights().sum().item() for batch in batches) == 13 * S
    for batch in batches:
        assert batch.tokens.shape == (micro_batch_size, S)
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            if sample_id != PADDING_SAMPLE:
                assert batch.tokens[row].equal(held_out.row(sample_id).tokens)


def test_validation_is_spread_over_the_whole_split(prepared: Path) -> None:
    held_out = HeldOut(TokenStream(prepared / "validation"), S)
    (starts,) = held_out.spread(5).values()
    assert starts == [S * (index * len(held_out) // 5) for index in range(5)]
    (everything,) = held_out.spread(len(held_out)).values()
    assert everything == [S * index for index in range(len(held_out))]


def test_pitfall_27_validation_reads_the_same_twice(prepared: Path) -> None:
    one, two = (list(validation_batches(HeldOut(TokenStream(prepared / "validation"), S), 6, 0, 1, 2)) for _ in "ab")
    assert all(a.tokens.equal(b.tokens) and a.labels.equal(b.labels) for (_, a), (_, b) in zip(one, two, strict=True))


def test_more_validation_than_there_is_names_what_there_is(prepared: Path) -> None:
    held_out = HeldOut(TokenStream(prepared / "validation"), S)
    for wrong, nearest in ((0, 1), (10**6, len(held_out))):
        with pytest.raises(DataError, match=rf"num_sequences = {wrong}: .*nearest legal {nearest}$"):
            list(validation_batches(held_out, wrong, 0, 1, 1))


def test_sources_in_any_order_give_the_same_data_and_the_same_held_out_sequences(tmp_path: Path) -> None:
    """A sequence never holds two sources, a copy stays with the same one, and each knows its share."""
    for number, name in enumerate(("prose", "code", "notes")):
        (tmp_path / name).mkdir()
        shared = ["the same line in all of them"]
        lines = [f"{name} {index} " + "again " * (index % 9) for index in range(60 + 30 * number)]
        (tmp_path / name / "lines.txt").write_text("\n".join(lines + shared))
    outputs = []
    for order in permutations(("prose", "code", "notes")):
        output = tmp_path / "-".join(order)
        paths = [str(tmp_path / name) for name in order]
        prepare(PrepareConfig(paths, "lines", output_dir=str(output), vocab_size=300, validation_ratio=0.4))
        outputs.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert all(found == outputs[0] for found in outputs)
    stream = TokenStream(output / "validation")
    split = stream.manifest.splits["validation"]
    assert [Path(source).name for source in split.sources] == ["code", "notes", "prose"]
    assert sum(split.sources.values()) == split.num_tokens
    held_out = HeldOut(stream, S)
    assert len(held_out) == split.num_sequences(S) == sum(map(len, held_out.spread(len(held_out)).values()))
    tokenizer, first = load_tokenizer(output).tokenizer, 0
    for source, starts in held_out.spread(len(held_out)).items():
        end = first + split.sources[source]
        text = tokenizer.decode(stream.read(first, end - first).tolist())
        others = {"prose", "code", "notes"} - {Path(source).name}
        assert Path(source).name in text and not any(other in text for other in others)
        assert starts[0] == first and starts[-1] + S + 1 <= end
        first = end


def test_sources_are_named_by_what_tells_them_apart() -> None:
    assert source_labels(["a/x", "b/y", "python:stdlib"]) == {"a/x": "x", "b/y": "y", "python:stdlib": "python:stdlib"}
    assert source_labels(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
