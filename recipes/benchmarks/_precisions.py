"""Which number formats can be timed here: a processor without instructions for bf16 emulates it, at a hundredth."""

from functools import partial

import torch

from recipes.benchmarks._timing import alternate, median_ratio

# With instructions for it bf16 costs about what fp32 does; emulated, the table would take hours and say nothing.
MAX_SLOWDOWN = 5.0
SIZE = 512


def bf16_slowdown() -> float:
    """Return how many times as long a bf16 product of two matrices takes as the same in fp32."""
    wide = torch.ones(SIZE, SIZE)
    narrow = wide.bfloat16()
    seconds = alternate({"bf16": partial(torch.matmul, narrow, narrow), "fp32": partial(torch.matmul, wide, wide)}, 5)
    return median_ratio(seconds, "bf16", "fp32")


def timed_precisions() -> tuple[torch.dtype, ...]:
    """Return fp32 and, where this machine has instructions for it, bf16."""
    return (torch.float32, torch.bfloat16) if bf16_slowdown() <= MAX_SLOWDOWN else (torch.float32,)
