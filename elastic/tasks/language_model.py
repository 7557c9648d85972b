"""A subnet of a nested checkpoint as a language model of lm-eval: the only module that imports lm-eval's classes.

Requests are answered in batches. A context that several requests share, as the choices of one question do, is read
once into caches; then each continuation goes on from a copy of them.

Shapes: B batch, C contexts, S tokens of a call, d kept width, V vocab.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from elastic.generate.batch import Decoder
from elastic.generate.sampling import Sampling
from elastic.generate.text import batches_by_length, generate_batch
from elastic.model.model import ElasticModel
from elastic.space.shape import Subnet

_HEAD_TOKENS = 512  # whose logits are there at once
# A decoder of tokens may drop white space where a text begins, so a little more than a stop text is decoded.
_MARGIN_TOKENS = 8

Pair = tuple[tuple[int, ...], tuple[int, ...]]


class RequestError(ValueError):
    """A request that no answer can be given to."""


@dataclass(frozen=True)
class Limits:
    """The longest sequence, how many are read at once, and what ends and never enters a text."""

    max_length: int
    batch_size: int
    eos_ids: frozenset[int] = frozenset()
    suppressed: tuple[int, ...] = ()
    seed: int = 0


class NestedLM(TemplateLM):
    """One subnet in slice execution. Tokens, truncation and windows are those of lm-eval's own `hf` on its export.

    Every tensor-parallel rank answers the same requests alike.
    """

    def __init__(self, model: ElasticModel, subnet: Subnet, tokenizer: Any, limits: Limits) -> None:
        super().__init__()
        self._model, self._subnet, self.limits = model, subnet, limits
        self.tokenizer = tokenizer  # stock transformers', as `hf` has it

    @property
    def eot_token_id(self) -> int:
        """Return what ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """Return what a text without context begins after."""
        token: int = self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        return token

    @property
    def tokenizer_name(self) -> str:
        """Name the tokenizer in lm-eval's records."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Encode; with the tokenizer's own special tokens where nothing is said and the text has none in front."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation in the tokenizer's own template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations of contexts."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, in windows of the longest sequence that do not overlap in what they predict."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens, longest = self.tok_encode(request.args[0]), self.limits.max_length
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, longest, context_len=1)
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Any, Any]], **_options: Any) -> list[Any]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        pairs = [self._cut(*tokens) for _, *tokens in requests]
        # Longest contexts first, those of one question side by side.
        order = sorted(range(len(pairs)), key=lambda n: (-len(pairs[n][0]), pairs[n][0], -len(pairs[n][1])))
        answers: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), self.limits.batch_size):
            numbers = order[first : first + self.limits.batch_size]
            for number, answer in zip(numbers, self._scored([pairs[n] for n in numbers]), strict=True):
                answers[number] = answer
                if (text := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answer)
        return [answers[number] for number in range(len(pairs))]

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """Leave out of a pair's front what is too long: all but the last token are read."""
        longest = self.limits.max_length
        if not 0 < len(continuation) <= longest:
            found = f"a continuation has {len(continuation)} tokens"
            raise RequestError(f"max_length = {longest}: {found}, and 1 to {longest} can be scored; set it higher")
        room = longest + 1 - len(continuation)
        return tuple(context[-room:]), tuple(continuation)

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Score the pairs of one batch."""
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        capacity = max(len(context) + len(continuation) for context, continuation in pairs)
        decoder = Decoder(self._model, self._subnet, capacity, batch=len(contexts))
        hidden = decoder.read(contexts)  # [S, C, d]
        last = hidden[[len(context) - 1 for context in contexts], range(len(contexts))]
        rows = [contexts.index(context) for context, _ in pairs]
        states = last[rows].unsqueeze(0)  # [1, B, d]: what the first token of a continuation is predicted from
        if any(len(continuation) > 1 for _, continuation in pairs):
            decoder.cache.keep(rows)
            states = torch.cat([states, decoder.read([continuation[:-1] for _, continuation in pairs])])
        return [
            _score(decoder, states[: len(continuation), row], continuation)
            for row, (_, continuation) in enumerate(pairs)
        ]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Write on from each context until one of its stop texts, with caches, requests of like settings together."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers: dict[int, str] = {}
        for numbers in alike.values():
            for number, text in self._written({n: requests[n].args[0] for n in numbers}, requests[numbers[0]].args[1]):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [answers[number] for number in range(len(requests))]

    def _written(self, contexts: dict[int, str], settings: dict[str, Any]) -> list[tuple[int, str]]:
        """Write on from contexts, each by its number, under the same settings."""
        given = normalize_gen_kwargs(settings, 256)
        until = handle_stop_sequences(given["until"], eos=self.tokenizer.decode(self.eot_token_id))
        new_tokens = given["max_gen_toks"]
        if (room := self.limits.max_length - new_tokens) < 1:
            rule = f"a task writes {new_tokens} tokens, which leaves no room for its question"
            raise RequestError(f"max_length = {self.limits.max_length}: {rule}; set it above {new_tokens}")
        drawn = (float(given.get("temperature", 0.0)), given.get("top_k") or None, given.get("top_p"), self.limits.seed)
        prompts = {n: (self.tok_encode(text) or [self.prefix_token_id])[-room:] for n, text in contexts.items()}
        numbers, written = list(prompts), list[tuple[int, str]]()
        for batch in batches_by_length([len(prompt) for prompt in prompts.values()], self.limits.batch_size):
            chosen = [numbers[place] for place in batch]
            samplings = [Sampling(*drawn, number, self.limits.suppressed) for number in chosen]
            texts = generate_batch(
                self._model,
                self._subnet,
                [prompts[number] for number in chosen],
                samplings,
                new_tokens,
                self.limits.eos_ids,
                stop=lambda tokens: self._has_stopped(tokens, until),
            )
            for number, text in zip(chosen, texts, strict=True):
                spoken = self.tokenizer.decode(list(text.tokens), skip_special_tokens=True)
                written.append((number, postprocess_generated_text(spoken, until, None)))
        return written

    def _has_stopped(self, tokens: Sequence[int], until: Sequence[str]) -> bool:
        """Tell whether a stop text has come with the last tokens; each stands for a byte at least."""
        longest = max(len(text.encode()) for text in until)
        tail = self.tokenizer.decode(list(tokens[-longest - _MARGIN_TOKENS :]))
        return any(text and text in tail for text in until)


def _score(decoder: Decoder, states: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Return the log-probability of tokens predicted from states [n, d], and whether each is the likeliest."""
    total, is_greedy = 0.0, True
    wanted = torch.tensor(continuation, device=states.device)
    for piece, tokens in zip(states.split(_HEAD_TOKENS), wanted.split(_HEAD_TOKENS), strict=True):
        logits = decoder.logits(piece)
        total += float(logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum())
        is_greedy = is_greedy and bool((logits.argmax(-1) == tokens).all())
    return total, is_greedy
