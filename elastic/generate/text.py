"""Write texts with one subnet, or think with one and answer with another: several texts at once, each as if alone.

The weights stay where they are: a decoder holds caches only, so decoders of several budgets share one model. A layer
that is cut along its rows copies what it keeps for the length of its own call, one layer at a time. Texts of a batch
share every product with the weights and nothing else: caches, positions and draws are each text's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic.generate.batch import Batch, End, Part, Text
from elastic.generate.sampling import Sampling
from elastic.model.model import ElasticModel
from elastic.space.shape import Subnet

# A decoder of tokens may drop white space where a text begins, so a little more than the marker is decoded.
_MARGIN_TOKENS = 4


class GenerateError(ValueError):
    """A prompt that cannot be gone on from."""


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
    """Write on from one prompt: a batch of one."""
    shown = None if on_token is None else [on_token]
    return generate_batch(model, plan, [prompt], [sampling], max_new_tokens, eos_ids, shown)[0]


def generate_batch(
    model: ElasticModel,
    plan: Subnet | ThinkPlan,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    on_token: Sequence[Callable[[int], None]] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
) -> list[Generation]:
    """Write on from each prompt to one of `eos_ids`, at most `max_new_tokens`; thinking has a limit of its own.

    Each text gets the tokens it would get alone, but for what another order of additions rounds differently. Its
    `on_token` receives every token, a forced marker's too, as soon as it is there; it ends where `stop` says so of its
    new tokens, the last of which has just come (of an answer, where there is thinking). Every tensor-parallel rank
    calls this alike and gets the same texts. Raises GenerateError for an empty prompt.
    """
    if not all(prompts):
        raise GenerateError("the prompt has no tokens; give a text to go on from")
    shown = [None] * len(prompts) if on_token is None else on_token
    texts = [Text(*each) for each in zip(prompts, samplings, shown, strict=True)]
    batch = Batch(model, texts, eos_ids, max(map(len, prompts)) + max_new_tokens)
    if isinstance(plan, Subnet):
        parts = batch.write(plan, max_new_tokens, stop)
        batch.finish(stop)
        return [Generation(tuple(text.new), (part,), text.ended) for text, part in zip(texts, parts, strict=True)]
    batch.capacity_tokens += plan.max_think_tokens + len(plan.marker.ids)
    # 1. Think.
    thinking = batch.write(plan.think, plan.max_think_tokens, plan.marker.has_come, plan.think == plan.answer)
    # 2. Put the marker there if it has not come.
    for text in batch.unfinished():
        text.forced = not plan.marker.has_come(text.new)
        for token in plan.marker.ids if text.forced else ():
            text.append(token)
        text.switch = len(text.new)
    # 3. Answer.
    answering = batch.write(plan.answer, max_new_tokens, stop)
    batch.finish(stop)
    return [
        Generation(tuple(text.new), parts[: 1 if text.switch is None else 2], text.ended, text.switch, text.forced)
        for text, parts in zip(texts, zip(thinking, answering, strict=True), strict=True)
    ]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Deal numbers 0, 1, ... of texts to batches of like lengths, longest first: what fits then fits to the end."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
