"""Decode several texts at once: their sequences in caches, and what each has written so far.

Shapes: B batch, S tokens of a call, d kept width, V vocab, v this rank's.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from elastic.generate.sampling import Sampling, choose_each
from elastic.model.cache import empty_cache
from elastic.model.forward import gathered_logits
from elastic.model.model import ElasticModel
from elastic.space.gates import Gates
from elastic.space.shape import Subnet


class Decoder:
    """Reads sequences piece by piece in slice execution and remembers them in caches.

    The model may be split over tensor-parallel ranks, all of which feed the same tokens and get the same logits;
    pipeline stages, context and sequence parallelism have no place here.
    """

    def __init__(self, model: ElasticModel, subnet: Subnet, capacity_tokens: int, batch: int = 1) -> None:
        groups, config = model.pg_collection, model.config
        assert groups.pp.size() == groups.cp.size() == 1 and not config.sequence_parallel
        self.subnet = subnet
        self._model, self._gates = model, Gates.slice(subnet)
        self._device = next(model.parameters()).device
        self.cache = empty_cache(
            model.decoder.masks.space.parent,
            subnet,
            capacity_tokens,
            batch=batch,
            tensor_parallel=groups.tp.size(),
            dtype=config.params_dtype,
            device=self._device,
        )

    @torch.no_grad()
    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append to each sequence; returns the hidden states [S, B, d], of no meaning behind a sequence's own tokens.

        Any number of tokens may come at any time: a prompt, one token, or what another subnet wrote meanwhile; and to
        each sequence another number, as long as one gets some.
        """
        counts = [len(own) for own in tokens]
        rows = [[*own, *(0,) * (max(counts) - len(own))] for own in tokens]
        ids = torch.tensor(rows, device=self._device)
        hidden: Tensor = self._model(ids, self._gates, cache=self.cache, counts=counts)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., d] to logits, fp32 [..., V]."""
        head = self._model.head_weight(self._gates)  # [v, d]
        return gathered_logits(hidden, head, self._model.pg_collection.tp).float()

    def feed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append as `read` does; returns the logits of the token after, fp32 [B, V], of no meaning where none came."""
        hidden = self.read(tokens)
        return self.logits(hidden[[max(len(own), 1) - 1 for own in tokens], range(len(tokens))])


class End(StrEnum):
    """Why a text ended."""

    EOS = "end of text"
    STOP = "stop text"
    LENGTH = "max_new_tokens"


@dataclass
class Part:
    """What one subnet did for a text: tokens it read at once and tokens it wrote; steps are single tokens it was fed.

    Times are the clock's, which the texts of a batch share.
    """

    subnet: Subnet
    read_tokens: int = 0
    read_s: float = 0.0
    new_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0

    def count(self, fed_tokens: int, elapsed_s: float) -> None:
        """Count one call, after which one token was written."""
        if fed_tokens == 1:
            self.steps, self.step_s = self.steps + 1, self.step_s + elapsed_s
        else:
            self.read_tokens, self.read_s = self.read_tokens + fed_tokens, self.read_s + elapsed_s
        self.new_tokens += 1


@dataclass
class Text:
    """A text in the making: its new tokens, of which a decoder has read all but the `unread` ones."""

    prompt: Sequence[int]
    sampling: Sampling
    on_token: Callable[[int], None] | None
    new: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    end: End | None = None  # None: it goes on
    switch: int | None = None
    forced: bool = False

    @property
    def ended(self) -> End:
        """Return why a finished text ended."""
        assert self.end is not None
        return self.end

    def append(self, token: int) -> None:
        """Take one more token."""
        self.new.append(token)
        self.unread.append(token)
        if self.on_token is not None:
            self.on_token(token)

    def take_unread(self) -> list[int]:
        """Return what is unread; it is then read."""
        taken, self.unread = self.unread, []
        return taken


@dataclass
class Batch:
    """Texts in the making, and the decoder at work, whose rows are the texts of these numbers."""

    model: ElasticModel
    texts: list[Text]
    eos_ids: frozenset[int]
    capacity_tokens: int
    decoder: Decoder | None = None
    rows: list[int] = field(default_factory=list)

    def unfinished(self) -> list[Text]:
        """Return the texts that have not ended."""
        return [text for text in self.texts if text.end is None]

    def finish(self, stop: Callable[[Sequence[int]], bool] | None) -> None:
        """Say of every text that has not come to its end why it goes on no further."""
        for text in self.unfinished():
            text.end = End.STOP if stop is not None and stop(text.new) else End.LENGTH

    def write(
        self,
        subnet: Subnet,
        max_tokens: int,
        stop: Callable[[Sequence[int]], bool] | None,
        keeps_stopped: bool = False,
    ) -> list[Part]:
        """Let `subnet` write at most `max_tokens` of each text, to its end or until `stop` says so of its new tokens.

        The decoder forgets a text at once that goes on no further, unless it `keeps_stopped` ones for what comes next.
        """
        parts = [Part(subnet) for _ in self.texts]
        writing = [number for number, text in enumerate(self.texts) if text.end is None and max_tokens > 0]
        decoder = self._decoder_of(subnet, writing)
        while writing:
            start_s = time.perf_counter()
            fed = {number: self.texts[number].take_unread() for number in writing}
            logits = decoder.feed([fed.get(number, ()) for number in self.rows])
            # The choice waits for the device, so the clock is right.
            tokens = self._chosen(writing, logits)
            elapsed_s = time.perf_counter() - start_s
            for number, token in zip(writing, tokens, strict=True):
                self.texts[number].append(token)
                parts[number].count(len(fed[number]), elapsed_s)
                if token in self.eos_ids:
                    self.texts[number].end = End.EOS
            open_ones = [number for number in writing if self.texts[number].end is None]
            writing = [
                number
                for number in open_ones
                if parts[number].new_tokens < max_tokens and not (stop and stop(self.texts[number].new))
            ]
            if not keeps_stopped and writing:
                self._keep(writing)
        return parts

    def _chosen(self, writing: list[int], logits: Tensor) -> list[int]:
        """Choose the next token of each text that is `writing`; logits [B, V] are those of the rows."""
        texts, rows = [self.texts[number] for number in writing], [self.rows.index(number) for number in writing]
        own = logits if writing == self.rows else logits[rows]
        return choose_each([text.sampling for text in texts], own, [len(text.prompt) + len(text.new) for text in texts])

    def _decoder_of(self, subnet: Subnet, writing: list[int]) -> Decoder:
        """Return the decoder at work if it runs `subnet`, else a new one that has read nothing yet."""
        if self.decoder is None or self.decoder.subnet != subnet:
            self.decoder = None  # its caches go before the next ones come
            self.decoder = Decoder(self.model, subnet, self.capacity_tokens, len(writing))
            self.rows = writing
            for text in (self.texts[number] for number in writing):
                text.unread = [*text.prompt, *text.new]
        self._keep(writing)
        return self.decoder

    def _keep(self, writing: list[int]) -> None:
        """Forget all other texts."""
        if writing != self.rows and self.decoder is not None:
            self.decoder.cache.keep([self.rows.index(number) for number in writing])
            self.rows = writing
