"""Deal samples to sources by weight, so that every source is within one sample of its share after any number of them.

w weight as a whole number, W their sum. Sample j of a source may come from place floor(j W / w) on and must have come
before place d = ceil((j + 1) W / w); at every place the earliest d of those that may come is taken, of equal ones the
first source. Unit jobs with such windows always fit (Baruah et al. 1996, proportionate fairness), so after n samples a
source has had floor(n w / W) or the next whole number.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np

from elastic.data.manifest import DataError
from elastic.space.ranges import LEAST_SHARE

MOST_PARTS = 2**40  # of weights that are not whole multiples of a larger part: 10^9 samples are within 0.001 of them
BLOCK = 1024


class Shares:
    """Map a sample to (source, its number among the source's samples): a pure function, at any place without a replay.

    Weights are read as the decimals they are written as, so that 0.1 is a tenth. Raises DataError for a weight of
    less than a millionth of all.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(float(weight))) for weight in weights]
        if not exact or not min(exact) >= LEAST_SHARE * sum(exact) > 0:
            raise DataError(f"weights {list(weights)}: each must be above a millionth of their sum; leave others out")
        common = math.lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * common) for weight in exact]
        parts = [part // math.gcd(*parts) for part in parts]
        if sum(parts) > MOST_PARTS:
            parts = [round(Fraction(part * MOST_PARTS, sum(parts))) for part in parts]
        self.parts, self.whole = tuple(parts), sum(parts)
        self._block = lru_cache(maxsize=16)(self._deal)  # as many as the samples of a large step take
        self._end: tuple[int, list[int]] = 0, [0] * len(parts)  # of the block dealt last: its place, the counts there

    def at(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample, and how many samples of that source came before."""
        return self._block(sample // BLOCK)[sample % BLOCK]

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first `num_samples` each source has had.

        All samples that had to come before place n = num_samples have; of those that might, at most one per source,
        some have. Of samples with the first m deadlines a server that always prefers them has served, by place n,
        min over s <= n of (those that may come before s) + n - s; what one deadline more adds is that source's sample.
        """
        n, whole = num_samples, self.whole
        had = [n * part // whole for part in self.parts]
        early = [source for source, part in enumerate(self.parts) if n * part % whole]  # has one that might have come
        if not early:
            return had
        # Before the first place from which one of them might come, more has come than there are places.
        origin = min(had[source] * whole // self.parts[source] for source in early)
        places = np.arange(n - origin + 1, dtype=np.int64)
        surplus = -places - origin
        for part in self.parts:
            before, rest = divmod(origin * part, whole)
            surplus += before - (-(rest + places * part) // whole)
        deadlines = {source: -(-(had[source] + 1) * whole // self.parts[source]) for source in early}
        served = min(0, int(surplus.min()))
        for source in sorted(early, key=lambda source: (deadlines[source], source), reverse=True):
            surplus[had[source] * whole // self.parts[source] + 1 - origin :] -= 1
            without = min(0, int(surplus.min()))
            had[source] += served - without
            served = without
        return had

    def _deal(self, block: int) -> list[tuple[int, int]]:
        """Deal the samples of a block."""
        start, (end, counts) = block * BLOCK, self._end
        counts = list(counts) if end == start else self.counts(start)
        windows = [self._window(source, count) for source, count in enumerate(counts)]
        dealt = []
        for place in range(start, start + BLOCK):
            _, source = min((due, source) for source, (begin, due) in enumerate(windows) if begin <= place)
            dealt.append((source, counts[source]))
            counts[source] += 1
            windows[source] = self._window(source, counts[source])
        self._end = start + BLOCK, counts
        return dealt

    def _window(self, source: int, index: int) -> tuple[int, int]:
        """Return the first place at which a source's sample may come, and the place before which it must have."""
        part = self.parts[source]
        return index * self.whole // part, -(-(index + 1) * self.whole // part)


@dataclass(frozen=True)
class Carried:
    """Where a run stood when its weights last changed: `sample` of `phase`, how many samples of that phase each source
    had given, and of each of the phases `before`: of all sources, for one that has left may come back."""

    phase: int = 0
    sample: int = 0
    consumed: Mapping[str, int] = field(default_factory=dict)
    before: Sequence[Mapping[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Mix:
    """Which source each sample of each phase comes from: `weights` by name, phase by phase, from `carried` on.

    Sources stand in the order of their names, so that the order of a list says nothing. Every phase reads each source
    from the start, in an order of its own.
    """

    weights: Sequence[Mapping[str, float]]
    carried: Carried = field(default_factory=Carried)

    def shares(self, phase: int) -> tuple[list[str], Shares]:
        """Return the sources that a phase reads, and how its samples are dealt to them."""
        names = sorted(name for name, weight in self.weights[phase].items() if weight)
        return names, Shares([self.weights[phase][name] for name in names])

    def parts(self, phase: int) -> dict[str, Fraction]:
        """Return the shares of the sources that a phase reads, exactly."""
        names, shares = self.shares(phase)
        return {name: Fraction(part, shares.whole) for name, part in zip(names, shares.parts, strict=True)}

    def start(self, phase: int) -> tuple[int, Mapping[str, int]]:
        """Return the sample of a phase from which on its shares hold, and what each source had given before."""
        return (self.carried.sample, self.carried.consumed) if phase == self.carried.phase else (0, {})

    def consumed(self, phase: int, sample: int) -> dict[str, int]:
        """Return how many samples before `sample` of a phase came from each source."""
        start, before = self.start(phase)
        names, shares = self.shares(phase)
        return dict(Counter(before) + Counter(dict(zip(names, shares.counts(sample - start), strict=True))))

    def read(self, num_samples: Sequence[int], phase: int, sample: int) -> list[Mapping[str, int]]:
        """Return how many samples each source gave, phase by phase up to `sample` of `phase`; `num_samples` of each."""
        places = [*num_samples[self.carried.phase : phase], sample] if phase >= self.carried.phase else []
        return [
            *self.carried.before,
            *(self.consumed(index, at) for index, at in enumerate(places, self.carried.phase)),
        ]

    def epochs(
        self, lengths: Sequence[Mapping[str, int]], num_samples: Sequence[int], phase: int, sample: int
    ) -> dict[str, float]:
        """Return how often each source has been read through before `sample` of `phase`.

        `lengths` of an epoch and `num_samples` by phase; a source without a length is left out.
        """
        total = dict.fromkeys(lengths[phase], 0.0)
        for of_phase, read in zip(lengths, self.read(num_samples, phase, sample), strict=False):
            for name in total.keys() & read.keys():
                total[name] += read[name] / of_phase[name]
        return total
