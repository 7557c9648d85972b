"""Time alternatives side by side: in turn, many rounds, ratios of rounds rather than lone times."""

import resource
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


def cpu_seconds() -> float:
    """Return what this process and those of it that have ended took."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
