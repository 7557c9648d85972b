"""Read prepared tokens: one long stream cut into chunks, and the micro-batches every rank takes from it.

Legend: S sequence length, B micro-batch size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from elastic.data.manifest import MASK_SUFFIX, REMEDY, DataError, checked_manifest
from elastic.data.order import SampleOrder, mixed_seed
from elastic.router.phases import Curriculum, Moment
from elastic.router.sampler import in_turn
from elastic.world.groups import World

DTYPES = ("uint16", "int32")
PADDING_SAMPLE = -1


class TokenStream:
    """The tokens of one split as a single memory-mapped stream, documents in file order, each ending in end-of-text.

    `prefix` is `<prepared folder>/train` or `.../validation`. Raises DataError when a file is missing, truncated,
    swapped or altered, or the tokenizer is another: sizes and sampled checksums against data.json.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.manifest = checked_manifest(self.prefix.parent, [self.prefix.name])
        if self.manifest.dtype not in DTYPES:
            raise DataError(f"{self.prefix}.bin: data.json says {self.manifest.dtype}, no type of token ids; {REMEDY}")
        self._tokens = np.asarray(np.memmap(f"{self.prefix}.bin", dtype=self.manifest.dtype, mode="r"))
        if self.num_tokens != self.manifest.splits[self.prefix.name].num_tokens:
            raise DataError(f"{self.prefix}.bin: holds {self.num_tokens:,} tokens, data.json says otherwise; {REMEDY}")
        self._counted = None
        if self.is_masked:
            self._counted = np.asarray(np.memmap(f"{self.prefix}{MASK_SUFFIX}", dtype=np.uint8, mode="r"))
            if len(self._counted) != -(-self.num_tokens // 8):
                raise DataError(f"{self.prefix}{MASK_SUFFIX}: holds no bit for every token; {REMEDY}")

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the stream holds."""
        return len(self._tokens)

    @property
    def is_masked(self) -> bool:
        """Tell whether the loss counts some of the tokens only."""
        return self.manifest.splits[self.prefix.name].num_counted is not None

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return tokens [count] from position `start`, int64."""
        assert start >= 0 and start + count <= self.num_tokens, f"tokens {start}..{start + count} are not in the stream"
        return torch.from_numpy(self._tokens[start : start + count].astype(np.int64))

    def counted(self, start: int, count: int) -> torch.Tensor:
        """Return which of the tokens [count] from position `start` the loss counts as labels, bool."""
        if self._counted is None:
            return torch.ones(count, dtype=torch.bool)
        first = start // 8
        bits = np.unpackbits(self._counted[first : -(-(start + count) // 8)], bitorder="little")
        return torch.from_numpy(bits[start - 8 * first :][:count].astype(bool))


class PackedSequences:
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
        num_chunks = (stream.num_tokens - 1) // sequence_length
        self.order = SampleOrder(num_chunks, mixed_seed(seed, salt, sequence_length))

    def __len__(self) -> int:
        """Return the number of chunks, which is the number of samples of an epoch."""
        return self.order.num_chunks

    def sample(self, sample_index: int) -> torch.Tensor:
        """Return tokens [S+1] int64 of a sample; indices run on through the epochs without end."""
        return self.stream.read(self.start(sample_index), self.sequence_length + 1)

    def start(self, sample_index: int) -> int:
        """Return the position in the stream of a sample's first token."""
        return self.order.chunk(sample_index) * self.sequence_length


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one data-parallel rank: tokens [B, S], labels [B, S], sample_ids [B], all int64 on the CPU.

    Label s is token s + 1. A sample id is the index within the phase, unique across epochs; -1 marks a row that only
    fills the last validation batches to their size. `counted` [B, S]: which labels the data's mask counts; None: all.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    counted: torch.Tensor | None = None
    positions: torch.Tensor | None = None

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


def _batch(stream: TokenStream, starts: list[int], sequence_length: int, sample_ids: list[int]) -> Batch:
    tokens = torch.stack([stream.read(start, sequence_length + 1) for start in starts])
    counted = None
    if stream.is_masked:
        counted = torch.stack([stream.counted(start + 1, sequence_length) for start in starts])
    ids = torch.tensor(sample_ids, dtype=torch.int64)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ids, counted)


def read_batch(
    dataset: PackedSequences,
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
    starts = [dataset.start(index) for index in sample_ids]
    return _batch(dataset.stream, starts, dataset.sequence_length, sample_ids)


class PhaseData:
    """This replica's micro-batches at any step of the curriculum: a pure function of (seed, step).

    Every phase reads the stream at its own length and in its own order. `numbers` says which of a step's micro-batches,
    counted over all replicas, this replica runs, and in which order; in turn without it.
    """

    def __init__(
        self,
        stream: TokenStream,
        curriculum: Curriculum,
        *,
        micro_batch_size: int,
        seed: int,
        world: World,
        numbers: Callable[[Moment, int, int, int], Sequence[int]] = in_turn,
    ) -> None:
        self.micro_batch_size, self.world, self.numbers = micro_batch_size, world, numbers
        self.is_masked = stream.is_masked
        self.datasets = [
            PackedSequences(stream, phase.sequence_length, seed, salt=index)
            for index, phase in enumerate(curriculum.phases)
        ]

    def batches(self, moment: Moment) -> list[Batch]:
        """Return the micro-batches of one step, in the order they run."""
        rank, replicas, size = self.world.data_rank, self.world.data_size, self.micro_batch_size
        dataset = self.datasets[moment.phase_index]
        numbers = self.numbers(moment, moment.phase.global_batch // (size * replicas), rank, replicas)
        return [read_batch(dataset, moment.consumed_samples, number, 0, 1, size) for number in numbers]


class HeldOut:
    """The held-out split as sequences [S + 1] of one source each: S tokens and the one that follows the last.

    Which sequences a loss is taken over is spread evenly over the split, not its front; so it does not depend on the
    order in which the sources were named, as the split itself does not.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.split = stream.manifest.splits[stream.prefix.name]

    def __len__(self) -> int:
        """Return how many sequences there are."""
        return self.split.num_sequences(self.sequence_length)

    def spread(self, num_sequences: int) -> dict[str, list[int]]:
        """Return the first token of each of `num_sequences` sequences, by source; sources without any are left out.

        Raises DataError when the split has fewer.
        """
        if not 1 <= num_sequences <= len(self):
            raise DataError(
                f"num_sequences = {num_sequences}: {self.stream.prefix} has {len(self)} sequences of "
                f"{self.sequence_length} tokens; nearest legal {max(1, min(num_sequences, len(self)))}"
            )
        wanted = [index * len(self) // num_sequences for index in range(num_sequences)]
        chosen: dict[str, list[int]] = {}
        first_sequence = first_token = 0
        for source, num_tokens in (self.split.sources or {str(self.stream.prefix): self.stream.num_tokens}).items():
            end = first_sequence + (num_tokens - 1) // self.sequence_length
            inside = [index - first_sequence for index in wanted if first_sequence <= index < end]
            if inside:
                chosen[source] = [first_token + index * self.sequence_length for index in inside]
            first_sequence, first_token = end, first_token + num_tokens
        return chosen

    def row(self, start: int) -> torch.Tensor:
        """Return tokens [S + 1] from position `start`, int64."""
        return self.stream.read(start, self.sequence_length + 1)


def source_labels(sources: Iterable[str]) -> dict[str, str]:
    """Name each configured path by its last part where that tells them apart, else by the whole."""
    paths = list(sources)
    parts = [Path(path).name or path for path in paths]
    return {path: part if parts.count(part) == 1 else path for path, part in zip(paths, parts, strict=True)}


def validation_batches(
    held_out: HeldOut, num_sequences: int, data_parallel_rank: int, data_parallel_size: int, micro_batch_size: int
) -> Iterator[tuple[str, Batch]]:
    """Yield (source, micro-batch): one rank's share of `num_sequences` sequences, the same set at any layout.

    Every rank gets the same number of full batches of every source. Rows beyond a source's last sequence repeat its
    first under sample id -1 and weigh nothing: reduce with `Batch.token_weights()`. Other sample ids are the position
    of the first token. Raises DataError when the split is shorter than `num_sequences`.
    """
    for source, starts in held_out.spread(num_sequences).items():
        for first_of_all in range(0, len(starts), data_parallel_size * micro_batch_size):
            first = first_of_all + data_parallel_rank * micro_batch_size
            mine = starts[first : first + micro_batch_size]
            fill = micro_batch_size - len(mine)
            rows, sample_ids = [*mine, *starts[:1] * fill], [*mine, *[PADDING_SAMPLE] * fill]
            yield source, _batch(held_out.stream, rows, held_out.sequence_length, sample_ids)
