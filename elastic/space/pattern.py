"""Parse the layer pattern of a hybrid model, here and nowhere else."""

from dataclasses import dataclass
from enum import StrEnum


class LayerKind(StrEnum):
    """One character of a hybrid layer pattern."""

    MAMBA = "M"
    MLP = "-"
    ATTENTION = "*"


class PatternError(ValueError):
    """A layer pattern holds a character this project does not know, or no layer at all."""


@dataclass(frozen=True)
class LayerPattern:
    """Order of the layers, for example ``M-M*-``.

    ``|`` marks a pipeline boundary in Megatron-Core's notation; it is not a layer and is kept only in `segments`.
    """

    kinds: tuple[LayerKind, ...]
    segments: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "LayerPattern":
        """Read `text`; raises PatternError for an unknown character, an empty pattern or an empty segment."""
        known = {kind.value: kind for kind in LayerKind}
        for position, character in enumerate(text):
            if character not in known and character != "|":
                raise PatternError(
                    f"layer pattern {text!r}: character {character!r} at position {position} is not one of "
                    f"{' '.join(known)} (and | between pipeline stages). Mixture-of-experts and "
                    f"multi-token-prediction layers are not supported."
                )
        segments = tuple(len(segment) for segment in text.split("|"))
        if 0 in segments:
            raise PatternError(f"layer pattern {text!r} is empty or has an empty pipeline segment")
        return cls(tuple(known[character] for character in text if character != "|"), segments)

    def __str__(self) -> str:
        return "".join(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def layers_of(self, kind: LayerKind) -> tuple[int, ...]:
        """List the global layer indices of one kind, ascending."""
        return tuple(index for index, other in enumerate(self.kinds) if other is kind)

    def ordinal(self, layer_index: int) -> int:
        """Return the position of `layer_index` among the layers of its own kind."""
        return self.kinds[:layer_index].count(self.kinds[layer_index])

    def select(self, kept_layers: tuple[int, ...]) -> "LayerPattern":
        """Return the pattern of the kept layers in their original order, without pipeline boundaries."""
        return LayerPattern(tuple(self.kinds[index] for index in kept_layers), (len(kept_layers),))
