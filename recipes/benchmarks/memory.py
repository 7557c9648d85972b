"""Peak memory: of a function by counting allocations, which repeats; of a whole process by its resident size."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Run `function` and return the most bytes of tensors alive at once, beyond those alive before and after.

    What stays (gradients, results that the caller keeps) does not count; memory that library kernels take besides the
    framework's allocator does not either.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        kept = max(torch.cuda.memory_allocated(device), before)
        return torch.cuda.max_memory_allocated(device) - kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    alive = peak = 0
    for event in sorted(recorded(profiler), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak - max(alive, 0)


def recorded(profiler: profile) -> list[Any]:
    """Return what a profiler has recorded, as it is: to make its own tables of it takes longer than the work."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return list(profiler.profiler.kineto_results.events())


def resident_bytes(field: str, pid: int | str = "self") -> int:
    """Return a line of a process's status: VmRSS now, VmHWM the peak since it was forgotten; 0 for one that ended."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def peak_resident_bytes(child: subprocess.Popen[Any], every_s: float = 0.02) -> int:
    """Wait for a child and return its peak.

    Not ru_maxrss of the child: that begins at the peak of the process which started it.
    """
    peak = 0
    while child.poll() is None:
        peak = max(peak, resident_bytes("VmHWM", child.pid))
        time.sleep(every_s)
    return peak
