"""Time, memory and launches of work on one device, cases in turn, within a number of seconds for all of it."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from recipes.benchmarks.memory import peak_extra_bytes, recorded

Work = Callable[[], object]
HEAD_START_CYCLES = 2_000_000


@dataclass(frozen=True)
class Cost:
    """One case: its time in every round, the peak beyond what was there before, kernels started (0: on a CPU)."""

    rounds_ms: list[float]
    peak_gib: float
    launches: int

    @property
    def ms(self) -> float:
        """Return the median time."""
        return statistics.median(self.rounds_ms)

    def row(self) -> dict[str, Any]:
        """Return all figures."""
        return {"ms": self.ms, **vars(self)}


@dataclass
class Clock:
    """A device and the time that is left for it; `left_out` says what was not measured, and why."""

    device: torch.device
    seconds: float
    rounds: int = 5
    left_out: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    def in_time(self, what: str) -> bool:
        """Tell whether there is time for `what`; else it is left out."""
        if self.used_s() < self.seconds:
            return True
        self.left_out.append(f"{what}: the {self.seconds:.0f} s are over")
        return False

    def used_s(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.started_s

    def ms(self, work: Work, head_start: bool = False) -> float:
        """Run once and return milliseconds, on a GPU between two of its own events.

        With a head start the GPU first waits about a millisecond, in which the host launches: the time is the GPU's
        alone, which that of a lone short kernel is not else.
        """
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)

    def costs(self, cases: Mapping[str, Work], group: str, head_start: bool = False) -> dict[str, Cost]:
        """Measure every case that there is memory and time for; all run in turn, none always on a warm cache."""
        peaks, launches = {}, {}
        for name, work in cases.items():
            if self.in_time(f"{group}, {name}") and self._fits(work, f"{group}, {name}"):
                peaks[name] = peak_extra_bytes(work, self.device) / 2**30
                launches[name] = self._launches(work)
        turns: dict[str, list[float]] = {name: [] for name in peaks}
        for index in range(self.rounds):
            if index and self.used_s() > self.seconds:
                break
            for name in turns if index % 2 else reversed(turns):
                turns[name].append(self.ms(cases[name], head_start))
        return {name: Cost(ms, peaks[name], launches[name]) for name, ms in turns.items()}

    def _fits(self, work: Work, what: str) -> bool:
        """Run once, which compiles and tunes kernels; tells whether the memory sufficed."""
        try:
            work()
            return True
        except torch.OutOfMemoryError:
            self.left_out.append(f"{what}: out of memory")
        torch.cuda.empty_cache()  # only here nothing of the failed call is held any more
        return False

    def _launches(self, work: Work) -> int:
        activity = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return sum(event.device_type() == DeviceType.CUDA for event in recorded(profiler))


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best: bf16 products, bytes copied (read and written), host time of one launch."""

    matmul_tflops: float
    copy_tb_per_s: float
    launch_us: float

    @classmethod
    def measured(cls, clock: Clock, tiny: bool) -> "Ceilings":
        """Measure with square matrices of 8,192, one GiB, and a thousand additions to one number."""
        size, num_bytes, launches = (64, 2**16, 10) if tiny else (8192, 2**30, 1000)
        a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
        source, number = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=clock.device), a[0, :1]
        target = torch.empty_like(source)

        def best_ms(work: Work) -> float:
            work()
            return min(clock.ms(work) for _ in range(10))

        product_ms, copy_ms = best_ms(lambda: a @ b), best_ms(lambda: target.copy_(source))
        started = time.perf_counter()
        for _ in range(launches):
            number.add_(0)
        return cls(
            matmul_tflops=2 * size**3 / product_ms / 1e9,
            copy_tb_per_s=2 * num_bytes / copy_ms / 1e9,
            launch_us=1e6 * (time.perf_counter() - started) / launches,
        )
