"""Time alternatives side by side: in turn, many rounds, ratios of rounds rather than lone times."""

import statistics
import time
from collections.abc import Callable, Mapping


def alternate(cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run every case once per round, in turn, `warmup` rounds uncounted; return seconds per round and case."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(warmup + rounds):
        names = list(cases)
        for name in names if index % 2 else reversed(names):  # neither case always runs on a warm cache
            start = time.perf_counter()
            cases[name]()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], case: str, against: str) -> float:
    """Return the median over rounds of one case's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[case], seconds[against], strict=True))
