"""Read the held-out split: sequences of one source each, the same ones at any layout."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from elastic.data.manifest import DataError
from elastic.data.packing import Packing, pack
from elastic.data.stream import PADDING_SAMPLE, Batch, Row, batch_of, concatenated_row, packed_row
from elastic.data.tokens import TokenStream


class HeldOut:
    """The held-out split as sequences of one source each: S tokens and what follows the last, or whole documents.

    Which sequences a loss is taken over is spread evenly over the split, not its front; so it does not depend on the
    order in which the sources were named, as the split itself does not.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self._packings: list[Packing] = []
        self._places: dict[str, range] = {}  # of each source: where its sequences start, or their numbers
        bounds = stream.bounds() if stream.packing == "isolated" else None
        begin = first = 0
        split = stream.manifest.splits[stream.prefix.name]
        for source, num_tokens in (split.sources or {str(stream.prefix): stream.num_tokens}).items():
            end = begin + num_tokens
            if bounds is None:
                count = (num_tokens - 1) // sequence_length
                self._places[source] = range(begin, begin + count * sequence_length, sequence_length)
            else:
                inside = bounds[np.searchsorted(bounds, begin) : np.searchsorted(bounds, end) + 1]
                self._packings.append(pack(inside, sequence_length, 0, stream.long_documents))
                self._places[source] = range(first, first + len(self._packings[-1]))
                first += len(self._packings[-1])
            begin = end

    def __len__(self) -> int:
        """Return how many sequences there are."""
        return sum(map(len, self._places.values()))

    def spread(self, num_sequences: int) -> dict[str, list[int]]:
        """Return which `num_sequences` sequences, by source, as `row` takes them; sources without any are left out.

        Raises DataError when the split has fewer.
        """
        if not 1 <= num_sequences <= len(self):
            raise DataError(
                f"num_sequences = {num_sequences}: {self.stream.prefix} has {len(self)} sequences of "
                f"{self.sequence_length} tokens; nearest legal {max(1, min(num_sequences, len(self)))}"
            )
        wanted = [index * len(self) // num_sequences for index in range(num_sequences)]
        chosen: dict[str, list[int]] = {}
        first = 0
        for source, places in self._places.items():
            inside = [places[index - first] for index in wanted if first <= index < first + len(places)]
            if inside:
                chosen[source] = inside
            first += len(places)
        return chosen

    def row(self, place: int) -> Row:
        """Return a sequence: the one from that position on, or of whole documents the one of that number."""
        if self.stream.packing == "concatenated":
            return concatenated_row(self.stream, place, self.sequence_length)
        for packing in self._packings:
            if place < len(packing):
                break
            place -= len(packing)
        return packed_row(self.stream, packing, place)


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
    first under sample id -1 and weigh nothing: reduce with `Batch.token_weights()`. Other sample ids are what
    `HeldOut.row` takes. Raises DataError when the split is shorter than `num_sequences`.
    """
    for source, starts in held_out.spread(num_sequences).items():
        for first_of_all in range(0, len(starts), data_parallel_size * micro_batch_size):
            first = first_of_all + data_parallel_rank * micro_batch_size
            mine = starts[first : first + micro_batch_size]
            fill = micro_batch_size - len(mine)
            rows = [held_out.row(start) for start in (*mine, *starts[:1] * fill)]
            yield source, batch_of(rows, [*mine, *[PADDING_SAMPLE] * fill])
