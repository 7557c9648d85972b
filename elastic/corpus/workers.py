"""Make documents and token ids of blocks, in this process or in several; results come in the order of the blocks.

What a worker process imports is light: no torch, no Megatron-Core; transformers for chats alone.
"""

import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np

from elastic.corpus.blocks import Block
from elastic.corpus.chat import ChatError, ChatTemplate
from elastic.corpus.config import PrepareConfig
from elastic.corpus.documents import Document, parse_block, sample_position, split_position
from elastic.corpus.files import Remark
from elastic.data.manifest import DataError, SkipRecord
from elastic.data.tokenizer import LoadedTokenizer, load_tokenizer

TRAIN = "train"
VALIDATION = "validation"
TEST = "test"
CHANGED = "changed while it was read; start again when it is at rest"
SERVE = "import sys; from elastic.corpus.workers import serve; serve(int(sys.argv[1]))"
SAMPLE_DOCUMENT_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Borders:
    """Where the splits lie: positions below `validation` are that, others below `test` are that, the rest train."""

    validation: int
    test: int

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits that are written."""
        held_out = ((VALIDATION, self.validation), (TEST, self.test - self.validation))
        return (TRAIN, *(name for name, size in held_out if size))

    def split(self, digest: bytes) -> str:
        """Return the split of a document."""
        position = split_position(digest)
        return VALIDATION if position < self.validation else TEST if position < self.test else TRAIN


@dataclass
class Scanned:
    """What one block holds: of each document digest, size and place; before which of them what was left out.

    `texts` are those that a tokenizer may be trained on.
    """

    digests: list[bytes] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    skipped: list[tuple[int, str, SkipRecord]] = field(default_factory=list)
    remarks: dict[int, list[Remark]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def skip(self, reason: str, record: SkipRecord) -> None:
        """Count what was left out here."""
        if self.skipped and self.skipped[-1][:2] == (len(self.digests), reason):
            self.skipped[-1][2].count += record.count
        else:
            self.skipped.append((len(self.digests), reason, SkipRecord(record.count, record.example)))


@dataclass(frozen=True)
class Encoded:
    """Documents of one block and split: their ids behind each other, their lengths, which ids the loss counts."""

    ids: np.ndarray
    lengths: list[int]
    counted: np.ndarray | None
    text_bytes: int
    sources: Counter[str]

    @classmethod
    def of(cls, parts: Sequence[tuple[Document, np.ndarray, np.ndarray | None]], dtype: str) -> "Encoded":
        """Put documents behind each other."""
        sources = Counter[str]()
        for document, ids, _ in parts:
            sources[document.source] += len(ids)
        counted = [which for _, _, which in parts if which is not None]
        return cls(
            ids=np.concatenate([ids for _, ids, _ in parts]).astype(dtype),
            lengths=[len(ids) for _, ids, _ in parts],
            counted=np.concatenate(counted) if counted else None,
            text_bytes=sum(document.num_bytes for document, _, _ in parts),
            sources=sources,
        )


@dataclass(frozen=True)
class Wanted:
    """Which of a block's documents are taken: a bit for each, and how many there are."""

    bits: bytes
    num_documents: int

    @classmethod
    def of(cls, taken: Sequence[bool]) -> "Wanted":
        """Pack the bits."""
        return cls(np.packbits(np.array(taken, dtype=bool)).tobytes(), len(taken))

    def unpacked(self) -> np.ndarray:
        """Return bool [documents]."""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.num_documents).astype(bool)


class Work:
    """Does the work on blocks in one process; the tokenizer lies in `folder`, from the second reading on at least."""

    def __init__(self, config: PrepareConfig, folder: Path) -> None:
        self.config, self.folder = config, folder

    @cached_property
    def template(self) -> ChatTemplate | None:
        """Open the chat template; None where text is read."""
        if not self.config.is_chat:
            return None
        given, own = self.config, load_tokenizer(self.folder)
        special, called = given.parse_special_tokens, given.tokenizer_path
        return ChatTemplate(self.folder, own, given.counted_part, parse_special_tokens=special, called=called)

    @cached_property
    def encoder(self) -> LoadedTokenizer | ChatTemplate:
        """Open what makes ids."""
        special, add_bos = self.config.parse_special_tokens, self.config.add_bos
        return self.template or load_tokenizer(self.folder, parse_special_tokens=special, add_bos=add_bos)

    def scan(self, block: Block, num_probed: int, sampled: tuple[int, int] | None) -> Scanned:
        """Look at a block; encodes its first `num_probed` chats, to find out early what cannot be done.

        `sampled` = (split position, sample position): a tokenizer may be trained on documents that are not below the
        first and below the second, or are the furthest from what is held out so far.
        """
        found, highest = Scanned(), -1
        for document in parse_block(block, self.config, self.template):
            if isinstance(document, dict):
                for reason, record in document.items():
                    found.skip(reason, record)
                continue
            number, position = len(found.digests), split_position(document.digest)
            if self.template is not None and number < num_probed:
                encode([document], self.template)
            if document.chat is not None and document.chat.conversation.ends_without_answer:
                found.remarks.setdefault(number, []).append(Remark.ENDS_WITHOUT_ANSWER)
            if document.chat is not None and document.chat.spelled:
                found.remarks.setdefault(number, []).append(Remark.SPELLS_SPECIAL_TOKEN)
            if sampled is not None:
                is_sampled = position >= sampled[0] and sample_position(document.digest) < sampled[1]
                if is_sampled or position > highest:
                    found.texts[number] = document.text[:SAMPLE_DOCUMENT_CHARACTERS]
                highest = max(highest, position)
            found.digests.append(document.digest)
            found.num_bytes.append(document.num_bytes)
            found.places.append(document.place)
        return found

    def encode(self, block: Block, wanted: Wanted, borders: Borders, dtype: str) -> tuple[bytes, dict[str, Encoded]]:
        """Encode the wanted documents of a block; returns all their digests, and by split what is written.

        Raises DataError when the block holds other documents than it did.
        """
        found = [one for one in parse_block(block, self.config, self.template) if isinstance(one, Document)]
        if len(found) != wanted.num_documents:
            raise DataError(f"data: {', '.join(self.config.paths)} {CHANGED}")
        documents = [document for document, taken in zip(found, wanted.unpacked(), strict=True) if taken]
        parts: dict[str, list[tuple[Document, np.ndarray, np.ndarray | None]]] = {name: [] for name in borders.splits}
        for document, (ids, counted) in zip(documents, encode(documents, self.encoder), strict=True):
            parts[borders.split(document.digest)].append((document, ids, counted))
        encoded = {split: Encoded.of(of_split, dtype) for split, of_split in parts.items() if of_split}
        return b"".join(document.digest for document in documents), encoded


def encode(
    documents: Sequence[Document], encoder: LoadedTokenizer | ChatTemplate
) -> Sequence[tuple[np.ndarray, np.ndarray | None]]:
    """Return the ids of each document, and which of them the loss counts, None for all."""
    if isinstance(encoder, LoadedTokenizer):
        return [(ids, None) for ids in encoder.encode_documents([document.text for document in documents])]
    try:
        return encoder.encode([document.chat for document in documents if document.chat is not None])
    except ChatError as error:
        raise DataError(f"{documents[error.index].place}: {error}") from error


class Workers:
    """`count` processes, each with a `Work` of its own; one is this process. They end where the `with` block does.

    A process that dies ends the preparation with a DataError; one whose parent dies ends by itself.
    """

    def __init__(self, config: PrepareConfig, folder: Path, count: int) -> None:
        self.own, self._count = Work(config, folder), count
        self._idle: SimpleQueue[tuple[subprocess.Popen[bytes], Connection]] = SimpleQueue()
        self._started: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def __enter__(self) -> Self:
        for _ in range(self._count if self._count > 1 else 0):
            ours, theirs = Pipe()
            # Neither a fork, which would copy threads that hold locks, nor multiprocessing's spawn, which would run the
            # imports of whoever called. A group of its own: Ctrl-C is for this process.
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            theirs.close()  # or nobody would hear that the process has ended
            ours.send((self.own.config, self.own.folder))
            self._started.append((process, ours))
            self._idle.put((process, ours))
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self._started:
            process.kill()  # it holds nothing that is wanted any more
            process.wait()
            connection.close()

    def run[R](self, task: Callable[..., R], inputs: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        """Yield `task(work, *arguments)` for all `inputs`, in their order; a few are read ahead for each process."""
        if not self._started:
            yield from (task(self.own, *arguments) for arguments in inputs)
            return
        waiting: deque[Future[R]] = deque()
        with ThreadPoolExecutor(len(self._started), thread_name_prefix="worker") as threads:
            try:
                for arguments in inputs:
                    waiting.append(threads.submit(self._ask, task, arguments))
                    if len(waiting) > 2 * len(self._started):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
                wait(waiting)

    def _ask[R](self, task: Callable[..., R], arguments: tuple[Any, ...]) -> R:
        process, connection = self._idle.get()
        try:
            connection.send((task, arguments))
            result: R | DataError = connection.recv()
        except (EOFError, OSError):
            code = process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise DataError(
                f"data: a worker process {how}, and nothing is written; where memory ran out take fewer with workers=N"
            ) from None
        finally:
            self._idle.put((process, connection))
        if isinstance(result, DataError):
            raise result
        return result


def serve(descriptor: int) -> None:
    """Do one task after another in a process of its own until the other end is closed, or its process gone."""
    connection: Connection = Connection(descriptor)
    try:
        work = Work(*connection.recv())
        while True:
            task, arguments = connection.recv()
            try:
                result = task(work, *arguments)
            except DataError as error:
                result = error
            connection.send(result)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
