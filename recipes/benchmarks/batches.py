"""Throughput of writing: prompts one by one against batches of them, at two budgets of the 25M parent of execution.py.

Uneven prompts, greedy, all to the same length, so that nobody leaves a batch early; tokens a second count what is
written, the reading of the prompts is inside the time.
"""

import statistics
from functools import partial
from typing import Any

import torch

from elastic.generate.sampling import Sampling
from elastic.generate.text import batches_by_length, generate_batch
from elastic.model.model import ElasticModel, build_model
from elastic.space.axes import Axis
from elastic.space.shape import Subnet
from elastic.world.groups import Layout
from recipes.benchmarks._timing import alternate, median_ratio
from recipes.benchmarks.execution import elastic_space, sizes

LENGTHS = (17, 128, 33, 96, 64, 21, 48, 80, 40, 112, 25, 72, 56, 100, 30, 88)
NEW_TOKENS = 32
BATCHES = (1, 4, 16)


def run(rounds: int) -> list[dict[str, Any]]:
    """Time every batch size in turn; returns tokens a second and the ratio to one by one."""
    size = sizes()[1]
    space = elastic_space(size.shape, num_choices=3)
    model = build_model(space, Layout()).eval()
    smallest = {axis: (len(space.axes[axis].choices) - 1,) * space.num_slots(axis) for axis in Axis}
    rows = []
    for name, subnet in (("full", Subnet.full(size.shape)), ("smallest", space.subnet(smallest))):
        times = alternate({str(batch): partial(write, model, subnet, batch) for batch in BATCHES}, rounds)
        written = len(LENGTHS) * NEW_TOKENS
        for batch in BATCHES:
            speed = written / statistics.median(times[str(batch)])
            ratio = median_ratio(times, "1", str(batch))
            rows.append({"what": name, "batch": batch, "tokens_per_s": speed, "ratio": ratio})
    return rows


def write(model: ElasticModel, subnet: Subnet, batch_size: int) -> None:
    """Write on from all prompts."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.decoder.masks.space.parent.vocab
    prompts = [torch.randint(vocab, (length,), generator=generator).tolist() for length in LENGTHS]
    for numbers in batches_by_length(LENGTHS, batch_size):
        given = [prompts[number] for number in numbers]
        generate_batch(model, subnet, given, [Sampling()] * len(numbers), NEW_TOKENS)
