"""Choose the next token from logits [V]: greedy, or drawn; a pure function of (seed, text, position)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the most likely one; top_k and top_p narrow a draw, null does not.

    `suppressed` tokens are never chosen, as those that only fill up the vocabulary. `text` numbers the texts of one
    run, so that the same prompt given twice is answered twice.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    text: int = 0
    suppressed: tuple[int, ...] = ()

    def choose(self, logits: Tensor, position: int) -> int:
        """Return the token for `position`, counted from the start of the prompt; of equal logits the first one."""
        if self.temperature == 0:
            return int(self._allowed(logits).argmax())
        digest = hashlib.blake2b(f"{self.seed}:{self.text}:{position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return int(torch.multinomial(self.probabilities(logits), 1, generator=generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what a draw is made from, fp32 [V] on the CPU: temperature, then top_k, then top_p.

        In this order as in stock transformers. top_p keeps the fewest likeliest tokens that reach it together.
        """
        logits = self._allowed(logits).float().cpu()
        # The largest one leaves first, in fp64, so that no temperature, however small, divides to inf.
        scaled = ((logits - logits.max()).double() / self.temperature).float()
        if self.top_k is not None and self.top_k < scaled.numel():
            smallest = scaled.topk(self.top_k).values[-1]
            scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
        if self.top_p is not None:
            ordered, order = scaled.sort(descending=True)
            likely = ordered.softmax(-1)
            above = likely.cumsum(-1) - likely  # what the likelier ones reach without this token
            dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter(0, order, above >= self.top_p)
            scaled = scaled.masked_fill(dropped, float("-inf"))
        return scaled.softmax(-1)

    def _allowed(self, logits: Tensor) -> Tensor:
        if not self.suppressed:
            return logits
        return logits.index_fill(-1, torch.tensor(self.suppressed, device=logits.device), float("-inf"))


def choose_each(samplings: Sequence[Sampling], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """Return each text's token of logits [B, V], as its own `choose` would; the device is waited for once."""
    first = samplings[0]
    if all(own.temperature == 0 and own.suppressed == first.suppressed for own in samplings):
        tokens: list[int] = first._allowed(logits).argmax(-1).tolist()
        return tokens
    each = zip(samplings, logits.cpu(), positions, strict=True)
    return [own.choose(row, position) for own, row, position in each]
