"""Make sequences of prepared tokens, and the micro-batches every rank takes from them.

Legend: S sequence length, B micro-batch size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from elastic.data.manifest import DataError
from elastic.data.order import SampleOrder, mixed_seed
from elastic.data.packing import Packing
from elastic.data.tokens import TokenStream
from elastic.router.phases import Moment
from elastic.router.sampler import in_turn
from elastic.world.groups import World

PADDING_SAMPLE = -1


@dataclass(frozen=True)
class Row:
    """One sequence: tokens [S] and labels [S] int64, label s what follows token s.

    `counted` [S] bool: which labels the loss counts; None: all. `positions` [S] int32: the place of each token in its
    own document, where documents must not see each other; None: the sequence is one document. `source` is the number
    of its source in a blend.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    counted: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    source: int | None = None


class Samples(Protocol):
    """A source of sequences of one length: `len()` of them make an epoch, indices run on without end; str() says it."""

    sequence_length: int
    is_masked: bool  # rows say which of their labels count

    def __len__(self) -> int: ...

    def row(self, sample_index: int) -> Row:
        """Return a sample's sequence, a pure function of the index."""
        ...

    def filled(self, sample_index: int) -> int | None:
        """Return how many places of a sample's sequence its packed documents fill; None: nothing is packed."""
        ...


def concatenated_row(stream: TokenStream, start: int, sequence_length: int) -> Row:
    """Return the sequence from position `start` on, whatever documents begin and end in it."""
    tokens = stream.read(start, sequence_length + 1)
    return Row(tokens[:-1], tokens[1:], stream.counted(start + 1, sequence_length) if stream.is_masked else None)


class Concatenated:
    """Chunks of S + 1 tokens of a stream, in an order shuffled anew for every epoch.

    Chunk c is tokens [c * S, c * S + S + 1), so neighbours share one token and every token but the first is a label
    once an epoch; up to S tokens at the end are left over. Documents are concatenated and **not** isolated: attention
    and Mamba states run across document boundaries inside a chunk, the plain GPT convention; the end-of-text id is
    all that separates them. `salt` (the phase's index) makes a later phase see the chunks in an order of its own.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int, salt: int = 0) -> None:
        if not 1 <= sequence_length < stream.num_tokens:
            raise DataError(
                f"sequence_length = {sequence_length}: {stream.prefix} holds {stream.num_tokens:,} tokens, a sequence "
                f"needs one more than its length; nearest legal {max(1, min(sequence_length, stream.num_tokens - 1))}"
            )
        self.stream = stream
        self.sequence_length = sequence_length
        self.is_masked = stream.is_masked
        num_chunks = (stream.num_tokens - 1) // sequence_length
        self.order = SampleOrder(num_chunks, mixed_seed(seed, salt, sequence_length))

    def __len__(self) -> int:
        """Return the number of chunks, which is the number of samples of an epoch."""
        return self.order.num_chunks

    def __str__(self) -> str:
        return f"{len(self):,} sequences of {self.sequence_length:,} tokens, documents behind one another"

    def row(self, sample_index: int) -> Row:
        """Return the sequence of a sample."""
        return concatenated_row(self.stream, self.start(sample_index), self.sequence_length)

    def filled(self, sample_index: int) -> None:
        """Return nothing: documents run through."""

    def start(self, sample_index: int) -> int:
        """Return the position in the stream of a sample's first token."""
        return self.order.chunk(sample_index) * self.sequence_length


def packed_row(stream: TokenStream, packing: Packing, sequence: int) -> Row:
    """Return a sequence of whole documents. A document's last token is a label and no input: no label is another's.

    What is left over repeats the sequence from its start and never counts: who looks at inputs, as importance does,
    sees text and no padding.
    """
    pieces, size = packing.pieces(sequence), packing.sequence_length
    read = [stream.read(start, length + 1) for start, length in pieces]
    tokens, labels = torch.cat([part[:-1] for part in read]), torch.cat([part[1:] for part in read])
    counted = torch.zeros(size, dtype=torch.bool)
    counted[: len(tokens)] = torch.cat([stream.counted(start + 1, length) for start, length in pieces])
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for _, length in pieces])
    again = -(-size // len(tokens))
    tokens, labels, positions = (part.repeat(again)[:size] for part in (tokens, labels, positions))
    return Row(tokens, labels, counted, positions)


class Isolated:
    """Whole documents packed into sequences (packing.py), which are read in an order shuffled anew for every epoch.

    Every document is read once an epoch. Which documents share a sequence is the same in every epoch and phase of one
    length: they never see each other. `salt` as for Concatenated.
    """

    is_masked = True  # what no document fills

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int, salt: int = 0) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.packing = stream.packed(sequence_length, mixed_seed(seed, sequence_length))
        self.order = SampleOrder(len(self.packing), mixed_seed(seed, salt, sequence_length))

    def __len__(self) -> int:
        """Return the number of sequences, which is the number of samples of an epoch."""
        return self.order.num_chunks

    def __str__(self) -> str:
        return str(self.packing)

    def row(self, sample_index: int) -> Row:
        """Return the sequence of a sample."""
        return packed_row(self.stream, self.packing, self.order.chunk(sample_index))

    def filled(self, sample_index: int) -> int:
        """Return how many places of a sample's sequence hold a token of a document."""
        return self.packing.filled(self.order.chunk(sample_index))


def samples_of(stream: TokenStream, sequence_length: int, seed: int, salt: int = 0) -> Samples:
    """Return the sequences of a stream, made as it says; raises DataError where there are none."""
    kind = Isolated if stream.packing == "isolated" else Concatenated
    return kind(stream, sequence_length, seed, salt)


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one data-parallel rank: tokens [B, S], labels [B, S], sample_ids [B], all int64 on the CPU.

    Label s follows token s. A sample id is the index within the phase, unique across epochs; -1 marks a row that only
    fills the last validation batches to their size. `counted` [B, S] bool: which labels count; None: all.
    `positions` [B, S] int32: each token's place in its own document, 0 starts one; None: a sequence is one document.
    `sources` of the rows in a blend, known on the host; empty without one.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    counted: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    sources: tuple[int, ...] = ()

    @property
    def counts_all(self) -> bool:
        """Tell that every token of every row counts: no mask, and no row that only fills up."""
        return self.counted is None and not bool((self.sample_ids == PADDING_SAMPLE).any())

    def token_weights(self) -> torch.Tensor:
        """Return fp32 weights [B, S]: 1 where the label counts, 0 where the mask leaves it out, or a row fills up."""
        real = (self.sample_ids != PADDING_SAMPLE).float()[:, None].expand(self.tokens.shape)
        return real.contiguous() if self.counted is None else real * self.counted

    def num_counted(self) -> int:
        """Return how many labels count."""
        return self.tokens.numel() if self.counts_all else int(self.token_weights().sum())


def batch_of(rows: Sequence[Row], sample_ids: Sequence[int]) -> Batch:
    """Put rows of one length together; what only some of them say is written out for the others."""
    counted = positions = None
    if any(row.counted is not None for row in rows):
        every = torch.ones(len(rows[0].tokens), dtype=torch.bool)
        counted = torch.stack([every if row.counted is None else row.counted for row in rows])
    if any(row.positions is not None for row in rows):
        whole = torch.arange(len(rows[0].tokens), dtype=torch.int32)
        positions = torch.stack([whole if row.positions is None else row.positions for row in rows])
    tokens, labels = (torch.stack(parts) for parts in zip(*((row.tokens, row.labels) for row in rows), strict=True))
    sources = tuple(row.source for row in rows if row.source is not None)
    return Batch(tokens, labels, torch.tensor(sample_ids, dtype=torch.int64), counted, positions, sources)


def read_batch(
    dataset: Samples,
    consumed_samples: int,
    micro_batch_index: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    micro_batch_size: int,
) -> Batch:
    """Return the micro-batch one data-parallel rank trains on, a pure function of its arguments.

    The step's micro-batches are counted over ranks first: g = micro_batch_index * data_parallel_size +
    data_parallel_rank takes samples consumed_samples + g * B up to B more. A step of the same global batch so reads
    the same samples at every layout and micro-batch size. `consumed_samples` counts within the phase.
    """
    assert 0 <= data_parallel_rank < data_parallel_size and micro_batch_index >= 0 and micro_batch_size >= 1
    global_index = micro_batch_index * data_parallel_size + data_parallel_rank
    first = consumed_samples + global_index * micro_batch_size
    sample_ids = list(range(first, first + micro_batch_size))
    return batch_of([dataset.row(index) for index in sample_ids], sample_ids)


class PhaseData:
    """This replica's micro-batches at any step of the curriculum: a pure function of (seed, step).

    Every phase reads samples of its own length, in its own order. `numbers` says which of a step's micro-batches,
    counted over all replicas, this replica runs, and in which order; in turn without it.
    """

    def __init__(
        self,
        datasets: Sequence[Samples],
        *,
        micro_batch_size: int,
        world: World,
        numbers: Callable[[Moment, int, int, int], Sequence[int]] = in_turn,
    ) -> None:
        self.datasets, self.micro_batch_size, self.world, self.numbers = datasets, micro_batch_size, world, numbers
        self.is_masked = any(samples.is_masked for samples in datasets)

    def batches(self, moment: Moment) -> list[Batch]:
        """Return the micro-batches of one step, in the order they run."""
        rank, replicas, size = self.world.data_rank, self.world.data_size, self.micro_batch_size
        dataset = self.datasets[moment.phase_index]
        numbers = self.numbers(moment, moment.phase.global_batch // (size * replicas), rank, replicas)
        return [read_batch(dataset, moment.consumed_samples, number, 0, 1, size) for number in numbers]

    def fill(self, moment: Moment) -> float | None:
        """Return the share of the places of a step's packed sequences that documents fill; None: there are none."""
        dataset, first = self.datasets[moment.phase_index], moment.consumed_samples
        found = [dataset.filled(index) for index in range(first, first + moment.phase.global_batch)]
        filled = [places for places in found if places is not None]
        return sum(filled) / (len(filled) * dataset.sequence_length) if filled else None
