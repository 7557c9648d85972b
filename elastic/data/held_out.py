"""Read the held-out split: sequences of one source each, the same ones at any layout."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from elastic.data.manifest import DataError
from elastic.data.stream import PADDING_SAMPLE, Batch, Row, TokenStream, batch_of, concatenated_row


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

    def row(self, start: int) -> Row:
        """Return the sequence from position `start`."""
        return concatenated_row(self.stream, start, self.sequence_length)


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
            rows = [held_out.row(start) for start in (*mine, *starts[:1] * fill)]
            yield source, batch_of(rows, [*mine, *[PADDING_SAMPLE] * fill])
