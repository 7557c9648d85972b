"""Choose the documents of a corpus in a first reading, so that a second one can encode them in any process."""

from collections import deque
from collections.abc import Callable, Iterator

from elastic.corpus.blocks import Block, Raw, read_blocks
from elastic.corpus.config import PrepareConfig
from elastic.corpus.documents import POSITIONS, sample_position, split_position
from elastic.corpus.files import SkipReason, Tally
from elastic.corpus.workers import CHANGED, SAMPLE_DOCUMENT_CHARACTERS, Borders, Scanned, Wanted
from elastic.data.manifest import DataError, SkipRecord

PROBED_CHATS = 32  # looked at for what the loss counts before the whole corpus has been read


class Chosen:
    """The documents that are taken, found in a first reading: each once, to the end or to `max_bytes`.

    Remembers a bit per document, and 130 bytes of each when duplicates are skipped. `on_read` hears of bytes read.
    """

    def __init__(self, config: PrepareConfig, total_bytes: int, on_read: Callable[[int], object]) -> None:
        self.config, self.tally, self._total_bytes, self._on_read = config, Tally(), total_bytes, on_read
        self.lowest, self.highest = POSITIONS, -1  # of the split positions
        self.nearest: list[int] = []  # the two lowest that are not for validation
        validation = int(config.validation_ratio * POSITIONS)
        self.nominal = Borders(validation, validation + int(config.test_ratio * POSITIONS))
        # Sampled by content and not from the front, so that the tokenizer sees the whole corpus whatever its order.
        read_bytes = max(1, min(total_bytes, config.max_bytes or total_bytes))
        self._sampled_below = POSITIONS * config.tokenizer_sample_bytes // read_bytes
        self.wanted: list[Wanted] = []
        self._seen: set[bytes] = set()
        self._sample: list[str] = []
        self._sample_bytes, self._surely_training = 0, ""

    def first(self) -> Iterator[tuple[Block, int, tuple[int, int] | None]]:
        """Yield what there is to scan, until the corpus ends or `add` has found enough."""
        sampled = (self.nominal.test, self._sampled_below) if self.config.tokenizer_path is None else None
        for number, block in enumerate(self._blocks()):
            if self.tally.stopped_at_max_bytes:
                return
            yield block, PROBED_CHATS if number == 0 else 0, sampled

    def again(self, borders: Borders, dtype: str) -> Iterator[tuple[Block, Wanted, Borders, str]]:
        """Yield what there is to encode; raises DataError when there are more blocks than there were."""
        for number, block in enumerate(self._blocks()):
            if number == len(self.wanted) and self.tally.stopped_at_max_bytes:
                return
            if number == len(self.wanted):
                raise DataError(f"data: {', '.join(self.config.paths)} {CHANGED}")
            yield block, self.wanted[number], borders, dtype

    def _blocks(self) -> Iterator[Block]:
        for block in read_blocks(self.config, self.config.part, self._total_bytes):
            yield block
            self._on_read(sum(len(part.content) for part in block if isinstance(part, Raw)))

    def add(self, found: Scanned) -> None:
        """Choose among the documents of the next block, unless there are enough."""
        if self.tally.stopped_at_max_bytes:
            return
        skipped, taken, ended = deque(found.skipped), list[bool](), False
        for number, (digest, num_bytes, place) in enumerate(
            zip(found.digests, found.num_bytes, found.places, strict=True)
        ):
            while skipped and skipped[0][0] <= number and not ended:
                self.tally.add(dict([skipped.popleft()[1:]]))
            is_copy = digest in self._seen
            limit = self.config.max_bytes
            ended = ended or (limit is not None and not is_copy and self.tally.kept_bytes + num_bytes > limit)
            taken.append(not (is_copy or ended))
            if is_copy and not ended:
                self.tally.add({SkipReason.DUPLICATE: SkipRecord(1, place)})
            if taken[-1]:
                self._take(digest, num_bytes, found.texts.get(number))
                for remark in found.remarks.get(number, ()):
                    self.tally.remark(remark, place)
        for _, reason, record in () if ended else skipped:
            self.tally.add({reason: record})
        self.tally.stopped_at_max_bytes = ended
        self.wanted.append(Wanted.of(taken))

    def _take(self, digest: bytes, num_bytes: int, text: str | None) -> None:
        if self.config.skip_duplicates:
            self._seen.add(digest)
        self.tally.kept += 1
        self.tally.kept_bytes += num_bytes
        self.tally.digest.update(digest)
        position = split_position(digest)
        self.lowest = min(self.lowest, position)
        if position >= self.nominal.validation:
            self.nearest = sorted({*self.nearest, position})[:2]
        is_highest, self.highest = position > self.highest, max(self.highest, position)
        if text is None:
            return
        if is_highest:
            self._surely_training = text
        is_sampled = position >= self.nominal.test and sample_position(digest) < self._sampled_below
        if is_sampled and self._sample_bytes < self.config.tokenizer_sample_bytes:
            self._sample.append(text)
            self._sample_bytes += min(num_bytes, 4 * SAMPLE_DOCUMENT_CHARACTERS)

    def sample(self) -> list[str]:
        """Return what the tokenizer is trained on."""
        # Few large documents may all miss the sample; the tokenizer still needs one that is not held out.
        return self._sample or [self._surely_training]
