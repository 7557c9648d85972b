"""Annotations of fields that a person writes: the rule for one field alone stands in its type."""

from dataclasses import dataclass
from typing import Annotated

NAME_PATTERN = r"\w[\w.+-]{0,99}"


@dataclass(frozen=True)
class Range:
    """Limits of one number, or of the length of a list; `open_low` and `open_high` exclude the limit itself."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False


@dataclass(frozen=True)
class Required:
    """Mark a text or a list that has no meaningful default; `hint` says what to put there."""

    hint: str


@dataclass(frozen=True)
class FolderName:
    """Mark a text that also names a folder: it must match `pattern` as a whole."""

    pattern: str = NAME_PATTERN
    rule: str = "it names a folder, too: letters, digits, _ . + and -, the first a letter, a digit or _"


Count = Annotated[int, Range(low=1)]
CountOrZero = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(low=0, open_low=True)]
PositiveOrZero = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1, open_low=True)]
Decay = Annotated[float, Range(low=0, high=1, open_high=True)]
Name = Annotated[str, Required("give it a name")]
MemberName = Annotated[str, Required("give it a name"), FolderName()]
