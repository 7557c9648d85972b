"""Write one text with one subnet, or think with one and answer with another.

The weights stay where they are: a decoder holds caches only, so decoders of several budgets share one model. A layer
that is cut along its rows copies what it keeps for the length of its own call, one layer at a time. Texts are written
one after another: a batch of prompts is a loop around this.

Shapes: B batch (one), d kept width, V vocab, v this rank's.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from elastic.generate.sampling import Sampling
from elastic.model.cache import empty_cache
from elastic.model.forward import gathered_logits
from elastic.model.model import ElasticModel
from elastic.space.gates import Gates
from elastic.space.shape import Subnet

# A decoder of tokens may drop white space where a text begins, so a little more than the marker is decoded.
_MARGIN_TOKENS = 4


class Decoder:
    """Reads one sequence piece by piece in slice execution and remembers it in caches.

    The model may be split over tensor-parallel ranks, all of which feed the same tokens and get the same logits;
    pipeline stages, context and sequence parallelism have no place here.
    """

    def __init__(self, model: ElasticModel, subnet: Subnet, capacity_tokens: int) -> None:
        groups, config = model.pg_collection, model.config
        assert groups.pp.size() == groups.cp.size() == 1 and not config.sequence_parallel
        self.subnet = subnet
        self._model, self._gates = model, Gates.slice(subnet)
        self._device = next(model.parameters()).device
        self.cache = empty_cache(
            model.decoder.masks.space.parent,
            subnet,
            capacity_tokens,
            tensor_parallel=groups.tp.size(),
            dtype=config.params_dtype,
            device=self._device,
        )

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append `tokens` to the sequence; returns the logits of the token after them, fp32 [V].

        Any number of tokens may come at any time: a prompt, one token, or what another subnet wrote meanwhile.
        """
        ids = torch.tensor([list(tokens)], device=self._device)
        last = self._model(ids, self._gates, cache=self.cache)[-1]  # [B, d]
        head = self._model.head_weight(self._gates)  # [v, d]
        return gathered_logits(last, head, self._model.pg_collection.tp)[0].float()


class GenerateError(ValueError):
    """A prompt that cannot be gone on from."""


class End(StrEnum):
    """Why a text ended."""

    EOS = "end of text"
    LENGTH = "max_new_tokens"


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


@dataclass
class Part:
    """What one subnet did: tokens it read at once and tokens it wrote; steps are the single tokens it was fed."""

    subnet: Subnet
    read_tokens: int = 0
    read_s: float = 0.0
    new_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0


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


def generate(
    model: ElasticModel,
    plan: Subnet | ThinkPlan,
    prompt: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Write on from `prompt` to one of `eos_ids`, at most `max_new_tokens`; thinking has a limit of its own.

    `on_token` receives every token, a forced marker's too, as soon as it is there.
    Every tensor-parallel rank calls this alike and gets the same text. Raises GenerateError for an empty prompt.
    """
    if not prompt:
        raise GenerateError("the prompt has no tokens; give a text to go on from")
    text = _Text(model, prompt, sampling, eos_ids, len(prompt) + max_new_tokens, on_token)
    if isinstance(plan, Subnet):
        part = text.write(plan, max_new_tokens)
        return Generation(tuple(text.new), (part,), text.end)
    text.capacity_tokens += plan.max_think_tokens + len(plan.marker.ids)
    # 1. Think.
    thinking = text.write(plan.think, plan.max_think_tokens, plan.marker)
    if text.end is End.EOS:
        return Generation(tuple(text.new), (thinking,), text.end)
    # 2. Put the marker there if it has not come.
    forced = not plan.marker.has_come(text.new)
    for token in plan.marker.ids if forced else ():
        text.append(token)
    # 3. Answer.
    switch = len(text.new)
    answering = text.write(plan.answer, max_new_tokens)
    return Generation(tuple(text.new), (thinking, answering), text.end, switch, forced)


@dataclass
class _Text:
    """A text in the making: its new tokens, and a decoder that has read all but the `unread` ones."""

    model: ElasticModel
    prompt: Sequence[int]
    sampling: Sampling
    eos_ids: frozenset[int]
    capacity_tokens: int
    on_token: Callable[[int], None] | None
    new: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    decoder: Decoder | None = None
    end: End = End.LENGTH

    def append(self, token: int) -> None:
        """Take one more token."""
        self.new.append(token)
        self.unread.append(token)
        if self.on_token is not None:
            self.on_token(token)

    def write(self, subnet: Subnet, max_tokens: int, marker: Marker | None = None) -> Part:
        """Let `subnet` write at most `max_tokens`, to the end of the text or until the marker has come."""
        decoder, part = self._decoder_of(subnet), Part(subnet)
        while part.new_tokens < max_tokens and self.end is not End.EOS:
            start_s = time.perf_counter()
            fed, self.unread = self.unread, []
            logits = decoder.feed(fed)
            # The choice waits for the device, so the clock is right.
            token = self.sampling.choose(logits, len(self.prompt) + len(self.new))
            elapsed_s = time.perf_counter() - start_s
            if len(fed) == 1:
                part.steps, part.step_s = part.steps + 1, part.step_s + elapsed_s
            else:
                part.read_tokens, part.read_s = part.read_tokens + len(fed), part.read_s + elapsed_s
            self.append(token)
            part.new_tokens += 1
            if token in self.eos_ids:
                self.end = End.EOS
            elif marker is not None and marker.has_come(self.new):
                break
        return part

    def _decoder_of(self, subnet: Subnet) -> Decoder:
        """Return the decoder at work if it runs `subnet`, else a new one that has read nothing yet."""
        if self.decoder is None or self.decoder.subnet != subnet:
            self.decoder = None  # its caches go before the next ones come
            self.decoder = Decoder(self.model, subnet, self.capacity_tokens)
            self.unread = [*self.prompt, *self.new]
        return self.decoder
