"""Compare two models' logits: the last word on whether a conversion kept the function."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitDifference:
    """Largest absolute difference, and the same divided by the largest reference logit."""

    max_abs: float
    relative: float

    @classmethod
    def between(cls, logits: Tensor, reference: Tensor) -> "LogitDifference":
        """Compare logits [B, S, V] with a reference of the same size; raises ValueError if the sizes differ."""
        if logits.shape != reference.shape:
            raise ValueError(f"logits are {tuple(logits.shape)}, the reference gives {tuple(reference.shape)}")
        reference = reference.detach().to("cpu", torch.float32)
        difference = (logits.detach().to("cpu", torch.float32) - reference).abs().max().item()
        return cls(difference, difference / max(reference.abs().max().item(), 1e-30))

    def within(self, tolerance: float) -> bool:
        """Tell whether the relative difference is at most `tolerance`; NaN never is."""
        return self.relative <= tolerance


def probe_tokens(vocab: int, batch: int = 2, length: int = 320, seed: int = 1234) -> Tensor:
    """Draw the fixed random token batch [B, S] on which functions are compared.

    The default length is longer than two scan chunks of 128, so a state carried over a whole chunk is compared too:
    stock transformers 5.6 to 5.13 is right in the first chunk and wrong behind it.
    """
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
