"""Render conversations by the tokenizer's own chat template and encode them, with the tokens the loss counts.

Ids are those of stock transformers' `apply_chat_template`, of the same tokenizer and template. A special token spelled
in a message would end its turn, or begin another: it is encoded as letters, as `sanitize_control_tokens` of newer
releases does.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer, processors

from elastic.corpus.conversation import Conversation, LossOn
from elastic.corpus.responses import Messages, Span, find_responses
from elastic.data.manifest import DataError
from elastic.data.tokenizer import PIECE_CHARACTERS, LoadedTokenizer, cut_pieces

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TOKEN_LIKE = re.compile(r"<\|[^|<>{}\s'\"]+\|>")
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them for uses like this one
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)

NO_TOKEN, NO_PLACE = np.zeros(0, np.int32), np.zeros((0, 2), np.int64)

LEFT_OPEN = (
    "the chat template leaves open which tokens are the assistant's: neither generation markers nor its text up to "
    "each answer tell; put {% generation %} ... {% endgeneration %} around them in a template of your own "
    "(chat_template=FILE.jinja), or set loss_on=all"
)


class TemplateRefusal(ValueError):
    """A conversation that the template does not render, with what it says."""


class NotSeparable(ValueError):
    """A conversation that spells a special token where the template changes the text around it."""


class ChatError(DataError):
    """A conversation, the `index`-th of those to be encoded, that this template and tokenizer cannot do exactly."""

    def __init__(self, index: int, text: str) -> None:
        self.index = index
        super().__init__(text)


@dataclass(frozen=True)
class Chat:
    """A rendered conversation: its text, the spans that spell a special token, those that the template marks."""

    conversation: Conversation
    text: str
    spelled: tuple[Span, ...]
    marked: tuple[Span, ...] | None


class ChatTemplate:
    """The tokenizer in `folder` with its chat template; raises DataError when one is missing or they do not fit.

    `loss_on` says which tokens count. With `parse_special_tokens` those spelled in messages become their ids. Messages
    call the folder `called`, where it is a copy of the user's.
    """

    def __init__(
        self,
        folder: Path,
        own: LoadedTokenizer,
        loss_on: LossOn,
        *,
        parse_special_tokens: bool,
        called: str | None = None,
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        self.loss_on, named = loss_on, f"tokenizer {called or folder}"
        try:
            self._stock: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{named}: stock transformers does not open it ({error})") from error
        given = self._stock.chat_template
        if not given:
            remedy = "prepare_data takes one as chat_template=FILE.jinja and puts it beside the tokenizer"
            raise DataError(f"{named}: has no chat template; {remedy}")
        tokenizer = Tokenizer.from_str(self._stock.backend_tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # It only trims white space off the offsets here, which would leave tokens without a place.
        tokenizer.post_processor = processors.Sequence([])
        self._tokenizer, vocabulary = tokenizer, tokenizer.get_vocab(with_added_tokens=True)
        if other := vocabulary.keys() ^ own.tokenizer.get_vocab(with_added_tokens=True).keys():
            rule = f"its settings and tokenizer.json differ in {', '.join(sorted(other)[:5])}"
            raise DataError(f"{named}: {rule}; save it anew with stock transformers")
        for template in given.values() if isinstance(given, dict) else [given]:
            if missing := sorted(set(TOKEN_LIKE.findall(template)) - vocabulary.keys()):
                raise DataError(
                    f"{named}: the chat template writes {', '.join(missing[:5])}, letters to it; "
                    "take the tokenizer the template was written for, or add them to it as special tokens"
                )
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        longest_first = "|".join(map(re.escape, sorted(special, key=lambda token: (-len(token), token))))
        self._special = re.compile(longest_first or "(?!)")
        self._shields = not parse_special_tokens

    def render(self, conversation: Conversation, *, prompt: bool = False) -> Chat:
        """Render a conversation, with `prompt` up to where the assistant's next turn begins.

        Raises TemplateRefusal, NotSeparable, or DataError for a broken template.
        """
        text, marked = self._rendered(conversation.messages, conversation.tools, prompt=prompt)
        shields = [mark for mark in NONCHARACTERS if mark not in text]
        start, end = shields[:2]
        shielded = self._shielded([conversation.messages, conversation.tools], f"{start}\\g<0>{end}")
        if not self._shields or shielded == [conversation.messages, conversation.tools]:
            return Chat(conversation, text, (), marked)
        pieces = re.split(f"([{start}{end}])", self._rendered(*shielded, prompt=prompt)[0])
        found, spelled, position = "".join(pieces[::2]), [], 0
        if found != text or pieces[1::2] != [start, end] * (len(pieces) // 4):
            raise NotSeparable
        for number, piece in enumerate(pieces[::2]):
            if number % 2:
                spelled.append((position, position + len(piece)))
            position += len(piece)
        return Chat(conversation, text, tuple(spelled), marked)

    def _rendered(self, messages: Messages, tools: Any, *, prompt: bool = False) -> tuple[str, tuple[Span, ...] | None]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            template = self._stock.get_chat_template(None, tools)
            has_marks = GENERATION.search(template) is not None
            (text,), marked = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=has_marks,
                add_generation_prompt=prompt,
                **self._stock.special_tokens_map,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"chat_template: line {error.lineno}: {error.message}") from error
        except REFUSALS as error:
            raise TemplateRefusal(str(error)) from error
        return text, tuple(map(tuple, marked[0])) if has_marks else None

    def _shielded(self, value: Any, replacement: str) -> Any:
        """Put marks around every special token that a string in `value` spells."""
        if isinstance(value, str):
            return self._special.sub(replacement, value)
        if isinstance(value, dict):
            return {self._shielded(k, replacement): self._shielded(v, replacement) for k, v in value.items()}
        return [self._shielded(item, replacement) for item in value] if isinstance(value, list) else value

    def counted_spans(self, chat: Chat) -> list[Span]:
        """Return the spans of `chat.text` whose tokens count, none where the template leaves it open."""
        if self.loss_on == "all":
            return [(0, len(chat.text))]
        spans = None if chat.marked is None else [span for span in chat.marked if span[0] < span[1]]
        if spans is None:
            tools = chat.conversation.tools

            def render(messages: Messages, prompt: bool) -> str | None:
                try:
                    return self._rendered(messages, tools, prompt=prompt)[0]
                except TemplateRefusal:
                    return None

            found = find_responses(render, chat.conversation.messages, chat.text)
            spans = (
                None if found is None else [(start, self._end_of_turn(chat.text, start, end)) for start, end in found]
            )
        if not spans or any(before[1] > after[0] for before, after in pairwise(spans)):
            return []
        return spans[-1:] if self.loss_on == "last_response" else spans

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Leave white space behind a special token that ends the turn to the template: generation stops before it."""
        last = end
        for match in self._special.finditer(text, start, end):
            last = match.end()
        return end if text[last:end].strip() else last

    def encode(self, chats: Sequence[Chat]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Encode on all cores; returns for each chat its ids [n], int32, and which count [n], bool; None: all.

        Raises ChatError where that is not certain.
        """
        places = [(number, piece) for number, chat in enumerate(chats) for piece in _pieces(chat)]
        plain = iter(self._encode_batch([chats[n].text[a:b] for n, (a, b, spelled) in places if not spelled]))
        ids, offsets = [[NO_TOKEN] for _ in chats], [[NO_PLACE] for _ in chats]
        for number, (start, end, spelled) in places:
            text = chats[number].text[start:end]
            encoded = self._letters(number, text) if spelled else next(plain)
            if not spelled and chats[number].spelled and start > 0:
                encoded = self._behind(text)
            ids[number].append(encoded[0])
            offsets[number].append(encoded[1] + start)
        counted = [self._counts(number, chat, np.concatenate(offsets[number])) for number, chat in enumerate(chats)]
        return [(np.concatenate(of_chat), which) for of_chat, which in zip(ids, counted, strict=True)]

    def _counts(self, number: int, chat: Chat, offsets: np.ndarray) -> np.ndarray | None:
        """Return the tokens that have a character in a span that counts, those across its ends included."""
        if self.loss_on == "all":
            return None
        first, last = offsets.T
        counted = np.zeros(len(first), dtype=bool)
        if not (spans := self.counted_spans(chat)):
            raise ChatError(number, LEFT_OPEN)
        for start, end in spans:
            counted |= (first < end) & (np.maximum(last, first + 1) > start)
        return counted

    def _encode_batch(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each text its ids [n] int32, and from which to before which character each token stands [n, 2].

        No list of Python's outlives this: of a message of 10 MB it would take longer than the library does.
        """
        if self.loss_on == "all":  # nobody asks where a token stands
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [(np.array(one.ids, np.int32), np.zeros((len(one.ids), 2), np.int64)) for one in found]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        places = (np.fromiter(chain.from_iterable(one.offsets), np.int64).reshape(-1, 2) for one in found)
        return [(np.array(one.ids, np.int32), where) for one, where in zip(found, places, strict=True)]

    def _behind(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a piece from within a text: behind a line end, so that no tokenizer puts a space in front."""
        (line_end, _), (ids, offsets) = self._encode_batch(["\n", "\n" + text])
        if not np.array_equal(ids[: len(line_end)], line_end):
            return self._encode_batch([text])[0]
        return ids[len(line_end) :], offsets[len(line_end) :] - 1

    def _letters(self, number: int, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a spelled special token as letters."""
        self._tokenizer.encode_special_tokens = True
        try:
            ids, offsets = self._behind(text)
        finally:
            self._tokenizer.encode_special_tokens = False
        if self._tokenizer.token_to_id(text) in ids:
            rule = f"the tokenizer makes the special token {text} of plain letters, and a message spells it"
            raise ChatError(number, f"{rule}; take the message out, or allow it with parse_special_tokens=true")
        return ids, offsets


def _pieces(chat: Chat) -> Iterator[tuple[int, int, bool]]:
    """Cut a text at the special tokens it spells, and where it is very long: (start, end, whether it spells one)."""
    bounds = [0, *(bound for span in chat.spelled for bound in span), len(chat.text)]
    for number, (start, end) in enumerate(pairwise(bounds)):
        if end - start <= PIECE_CHARACTERS:
            if end > start:
                yield start, end, number % 2 == 1
            continue
        for piece in cut_pieces(chat.text[start:end]):
            yield start, start + len(piece), False
            start += len(piece)
