"""Peak memory of a function, by counting allocations: repeatable, unlike the resident size of the process."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

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
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak - max(alive, 0)
