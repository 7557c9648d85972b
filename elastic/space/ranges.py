"""Annotations of fields that a person writes: the rule for one field alone stands in its type.

Every number has two limits. The upper ones lie far beyond any use and have a reason beside them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

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


# Of activations: none, what stands between matrix products (model/recompute.py), or whole layers.
Recompute = Literal["none", "selective", "full"]
# Sizes of a model. 1,024 layers at these limits count FLOPs below 2^63, where torch's integers end.
MOST_LAYERS = 2**10
Heads = Annotated[int, Range(1, 2**13)]  # also groups, states, and channels of one head
Size = Annotated[int, Range(1, 2**20)]  # channels and neurons
Params = Annotated[int, Range(1, 2**60)]  # of a whole subnet
Taps = Annotated[int, Range(2, 2**8)]
Vocab = Annotated[int, Range(1, 2**24)]
Layers = Annotated[int, Range(0, MOST_LAYERS)]
Length = Annotated[int, Range(1, 2**24)]  # tokens of one sequence, 16 times the longest context in use
TrainedLength = Annotated[int, Range(2, 2**24)]  # a sequence to learn from has a token that follows
# A training run.
Sequences = Annotated[int, Range(1, 2**24)]  # at once: with their length still a number of tokens below 2^53
MOST_STEPS = 10**9  # one a second for thirty years
Steps = Annotated[int, Range(1, MOST_STEPS)]
StepsOrZero = Annotated[int, Range(0, MOST_STEPS)]
Tokens = Annotated[int, Range(1, 10**16)]  # hundreds of times all text there is
Files = Annotated[int, Range(1, 10**6)]
Ranks = Annotated[int, Range(1, 2**20)]  # processes, GPUs: ten times the largest cluster
Proposals = Annotated[int, Range(1, 10**6)]  # of a search, which tells them apart in memory
Threads = Annotated[int, Range(1, 2**10)]  # of one process: an operating system gives no more
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what generators of every library take
Bytes = Annotated[int, Range(1, 2**60)]  # more than a file system holds
Seconds = Annotated[float, Range(0, 30 * 86_400, open_low=True)]  # a month: a rank silent for longer is gone
# Rates and weights, all of which meet fp32.
Rate = Annotated[float, Range(0, 1e3)]  # Adam moves a weight by about the rate in each step
Weight = Annotated[float, Range(0, 1e6)]  # of a term: beyond a millionth the other ones are noise
Epsilon = Annotated[float, Range(0, 1, open_low=True)]  # beside squares of about 1
Deviations = Annotated[float, Range(0, 1e6, open_low=True)]
Temperature = Annotated[float, Range(1e-3, 1e3)]  # logits of some hundreds over it stay finite, and tell apart
TemperatureOrZero = Annotated[float, Range(0, 1e3)]
Scale = Annotated[float, Range(0, 1e3, open_low=True)]
Decay = Annotated[float, Range(0, 1, open_high=True)]
LEAST_SHARE = 2.0**-20  # of a blend: who comes at a place is decided over a window as long as the inverse of it
Share = Annotated[float, Range(0, 1, open_low=True)]
# Costs and machines.
ElementBytes = Annotated[float, Range(0, 16, open_low=True)]  # complex numbers of double precision
Target = Annotated[float, Range(0, 1e30, open_low=True)]  # above every cost that the limits before allow
Speed = Annotated[float, Range(0, 1e9, open_low=True)]  # TFLOP/s, GB/s, GB
Amount = Annotated[float, Range(0, 1e6)]  # GB, money
Name = Annotated[str, Required("give it a name")]
DataChecks = Literal["sizes", "sampled", "full"]  # of prepared data, when it is opened
MemberName = Annotated[str, Required("give it a name"), FolderName()]
