"""Find the assistant's answers in a rendered conversation by rendering parts of it and comparing.

An answer begins where the prompt for it ends and goes to the end of its turn. Of a template that writes every turn the
same, whatever follows, the prompt and the answered conversation are prefixes of the whole text. A template that drops
the thoughts of earlier turns writes a turn differently once another follows; then a word that stands in place of a
message's content tells what is written around it. Where neither is certain, nothing is guessed.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from elastic.corpus.conversation import ASSISTANT

type Messages = Sequence[dict[str, Any]]
type Span = tuple[int, int]
type Render = Callable[[Messages, bool], str | None]


def find_responses(render: Render, messages: Messages, text: str) -> list[Span] | None:
    """Return the span of each answer in `text`, which is `render(messages, False)`; None when one is not certain.

    `render` takes messages and whether to end with the prompt for the next answer, None where the template refuses.
    """
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        span = _by_prefix(render, messages, text, index) or _by_probe(render, messages, text, index)
        if span is None or span[1] <= span[0] or (spans and span[0] < spans[-1][1]):
            return None
        spans.append(span)
    return spans


def _by_prefix(render: Render, messages: Messages, text: str, index: int) -> Span | None:
    if index == 0:
        return None
    prompt = render(messages[:index], True)
    answered = text if index == len(messages) - 1 else render(messages[: index + 1], False)
    if prompt is None or answered is None:
        return None
    exact = answered.startswith(prompt) and text.startswith(answered)
    return (len(prompt), len(answered)) if exact else None


def _by_probe(render: Render, messages: Messages, text: str, index: int) -> Span | None:
    """Find where the answer's turn begins and ends in `text`; the prompt is what both it and the turn begin with."""
    for end, head in _probes(render, messages, text, index):
        for begin, prompt in _turn_begins(render, messages, text, index):
            if text.startswith(prompt, begin):
                return begin + len(prompt), end
            # The turn is written without a part of the prompt, an opened thought for example. What is always written
            # before the content tells how much of the prompt it has, so that content which looks like it is no prompt.
            written = _common_start(prompt, head[begin:])
            if written and head[:begin] == text[:begin] and text.startswith(written, begin):
                return begin + len(written), end
    return None


def _common_start(one: str, other: str) -> str:
    """Return what two texts begin with."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in pairs)


def _turn_begins(render: Render, messages: Messages, text: str, index: int) -> Iterator[tuple[int, str]]:
    """Yield where the turn of message `index` begins in `text`, and the prompt that the template writes for it."""
    if index == 0:
        prompted = render(messages, True)
        if prompted is not None and prompted.startswith(text) and len(prompted) > len(text):
            prompt = prompted[len(text) :]
            for _, head in _probes(render, messages, text, 0):
                if head.endswith(prompt) and text.startswith(head):
                    yield len(head) - len(prompt), prompt
        return
    before, prompted = render(messages[:index], False), render(messages[:index], True)
    if before is not None and prompted is not None and prompted.startswith(before):
        for begin, _ in _probes(render, messages, text, index - 1):
            yield begin, prompted[len(before) :]


def _probes(render: Render, messages: Messages, text: str, index: int) -> Iterator[tuple[int, str]]:
    """Yield the end of message `index` in `text`, and what a probe's whole text says before the probe.

    The probe stands for the content, beside the message's calls, then alone. It counts where all that is written
    behind it is what `text` ends with, and begins as it does when the message is the last.
    """
    message, number = messages[index], 0
    while (word := f"Probe{number}Word") in text:
        number += 1
    bare = {name: value for name, value in message.items() if name not in ("tool_calls", "reasoning_content")}
    for kept in (message, bare) if bare != message else (message,):
        probe = {**kept, "content": word}
        whole = render([*messages[:index], probe, *messages[index + 1 :]], False)
        alone = render([*messages[:index], probe], False)
        if whole is None or alone is None or whole.count(word) != 1 or alone.count(word) != 1:
            continue
        head, tail = whole.split(word)
        closing = alone.split(word)[1]
        if tail.startswith(closing) and text.endswith(tail):
            yield len(text) - len(tail) + len(closing), head
