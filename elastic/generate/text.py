"""Write one text with one subnet, or think with one and answer with another.

Texts are written one after another: a batch of prompts is a loop around this.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from elastic.generate.decoder import Decoder
from elastic.generate.sampling import Sampling
from elastic.model.model import ElasticModel
from elastic.space.shape import Subnet

# A decoder of tokens may drop white space where a text begins, so a little more than the marker is decoded.
_MARGIN_TOKENS = 4


class GenerateError(ValueError):
    """A prompt that cannot be gone on from."""


class End(StrEnum):
    """Why a text ended."""

    EOS = "end of text"
    LENGTH = "max_new_tokens"


@dataclass(frozen=True)
class Limits:
    """When a text ends: at one of `eos_ids`, or after `max_new_tokens` tokens; thinking has a limit of its own."""

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Marker:
    """What ends the thinking. `ids` are put there when it does not come by itself; `decode` turns tokens into text.

    One rule tells whether it has come: the decoded thinking contains the text. Tokens are not compared, because the
    same letters may come as other tokens than `ids`, split or joined with what stands beside them; letters that share
    the marker's last token belong to the text before the switch.
    """

    text: str
    ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]

    def has_come(self, thinking: Sequence[int]) -> bool:
        """Tell whether the last token of the thinking completes the marker.

        A token stands for at least one byte, so the marker lies within its own number of bytes of last tokens.
        """
        return self.text in self.decode(thinking[-len(self.text.encode()) - _MARGIN_TOKENS :])


@dataclass(frozen=True)
class ThinkPlan:
    """Think with one subnet until the marker comes, at most `max_think_tokens`, then answer with another.

    Out of tokens, the marker is forced. The answering subnet reads prompt, thinking and marker once; where both subnets
    are the same nothing is read again. A text that ends while thinking has no answer.
    """

    think: Subnet
    answer: Subnet
    marker: Marker
    max_think_tokens: int


@dataclass(frozen=True)
class Part:
    """What one subnet did: tokens it read at once and tokens it wrote; steps are the single tokens it was fed."""

    subnet: Subnet
    read_tokens: int
    read_s: float
    new_tokens: int
    steps: int
    step_s: float


@dataclass(frozen=True)
class Generation:
    """One text: the tokens after the prompt, who wrote them, and why it ended.

    `switch` counts the tokens before the answering subnet took over, marker included; None if it never did.
    """

    tokens: tuple[int, ...]
    parts: tuple[Part, ...]
    end: End
    switch: int | None = None
    forced_marker: bool = False


def ignore(token: int) -> None:
    """Do nothing with a token."""


def generate(
    model: ElasticModel,
    plan: Subnet | ThinkPlan,
    prompt: Sequence[int],
    sampling: Sampling,
    limits: Limits,
    on_token: Callable[[int], None] = ignore,
) -> Generation:
    """Write on from `prompt`; `on_token` receives every token, a forced marker's too, as soon as it is there.

    Every tensor-parallel rank calls this alike and gets the same text. Raises GenerateError for an empty prompt.
    """
    if not prompt:
        raise GenerateError("the prompt has no tokens; give a text to go on from")
    if isinstance(plan, Subnet):
        text = _Text(model, prompt, sampling, limits.eos_ids, len(prompt) + limits.max_new_tokens, on_token)
        part = text.write(plan, limits.max_new_tokens)
        return Generation(tuple(text.new), (part,), text.end)
    marker = plan.marker
    room = len(prompt) + plan.max_think_tokens + len(marker.ids) + limits.max_new_tokens
    text = _Text(model, prompt, sampling, limits.eos_ids, room, on_token)
    # 1. Think.
    thinking = text.write(plan.think, plan.max_think_tokens, marker.has_come)
    if text.end is End.EOS:
        return Generation(tuple(text.new), (thinking,), text.end)
    # 2. Put the marker there if it has not come.
    forced = not marker.has_come(text.new)
    if forced:
        for token in marker.ids:
            text.append(token)
    # 3. Answer.
    switch = len(text.new)
    answering = text.write(plan.answer, limits.max_new_tokens)
    return Generation(tuple(text.new), (thinking, answering), text.end, switch, forced)


class _Text:
    """A text in the making: its tokens, and a decoder that has read them up to some point."""

    def __init__(
        self,
        model: ElasticModel,
        prompt: Sequence[int],
        sampling: Sampling,
        eos_ids: frozenset[int],
        capacity_tokens: int,
        on_token: Callable[[int], None],
    ) -> None:
        self.new: list[int] = []
        self.end = End.LENGTH
        self._model, self._prompt, self._on_token = model, list(prompt), on_token
        self._sampling, self._eos_ids, self._capacity_tokens = sampling, eos_ids, capacity_tokens
        self._decoder: Decoder | None = None
        self._unread: list[int] = []  # by the decoder

    def append(self, token: int) -> None:
        """Take one more token."""
        self.new.append(token)
        self._unread.append(token)
        self._on_token(token)

    def write(
        self, subnet: Subnet, max_tokens: int, until: Callable[[Sequence[int]], bool] = lambda new: False
    ) -> Part:
        """Let `subnet` write at most `max_tokens`, to the end of the text or until `until` holds for all new tokens."""
        decoder = self._decoder_of(subnet)
        written, read_tokens, steps, read_s, step_s = 0, 0, 0, 0.0, 0.0
        while written < max_tokens:
            start_s = time.perf_counter()
            fed, self._unread = self._unread, []
            logits = decoder.feed(fed)
            # The choice waits for the device, so the clock is right.
            token = self._sampling.choose(logits, len(self._prompt) + len(self.new))
            elapsed_s = time.perf_counter() - start_s
            if len(fed) == 1:
                steps, step_s = steps + 1, step_s + elapsed_s
            else:
                read_tokens, read_s = read_tokens + len(fed), read_s + elapsed_s
            self.append(token)
            written += 1
            if token in self._eos_ids:
                self.end = End.EOS
                break
            if until(self.new):
                break
        return Part(subnet, read_tokens, read_s, written, steps, step_s)

    def _decoder_of(self, subnet: Subnet) -> Decoder:
        """Return the decoder at work if it runs `subnet`, else a new one that has read nothing yet."""
        if self._decoder is None or self._decoder.subnet != subnet:
            self._decoder = None  # its caches go before the next ones come
            self._decoder = Decoder(self._model, subnet, self._capacity_tokens)
            self._unread = self._prompt + self.new
        return self._decoder
