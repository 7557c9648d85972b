"""Three budgets served from one resident model need hardly more memory than the parent alone."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from elastic.generate.batch import Decoder
from elastic.generate.sampling import Sampling
from elastic.generate.text import generate
from elastic.space.shape import Subnet
from elastic.space.space import Space
from tests.parity.model_factory import A, C, build_lively, one_process, shape_of, smallest_choice
from tests.shapes import random_choice

# As many layers as the published parent, and of its kinds: what one layer needs for itself is a small share of all.
SPACE = Space(
    shape_of(
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        hidden=64, ffn=256, mamba_heads=8, mamba_groups=2, head_channels=16, attention_heads=8, attention_channels=8,
    ),
    {
        A.HIDDEN: C((64, 56)),
        A.FFN: C((256, 192, 128), per_layer=True),
        A.MAMBA_HEAD: C((8, 6)),
        A.MAMBA_CHANNEL: C((16, 12)),
        A.ATTENTION_HEAD: C((8, 4)),
        A.DEPTH: C((62, 56)),
    },
)  # fmt: skip
PROMPT = list(range(20))


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def allocations(call: Callable[[], object]) -> list[int]:
    """Return the bytes of every tensor memory request (+) and release (-) on the CPU during a call, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(changes: list[int]) -> int:
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def test_three_budgets_need_little_more_than_the_parent() -> None:
    model = build_lively(SPACE).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(1)
    full = Subnet.full(SPACE.parent)
    budgets = [full, SPACE.subnet(random_choice(SPACE, generator)), SPACE.subnet(smallest_choice(SPACE))]

    def serve(subnets: list[Subnet]) -> Callable[[], None]:
        def run() -> None:
            for subnet in subnets:
                generate(model, subnet, PROMPT, Sampling(), 2)

        return run

    alone, together = (peak(allocations(serve(subnets))) for subnets in ([full], budgets))
    assert alone > 0
    assert weights + together <= 1.05 * (weights + alone)


def test_a_step_of_decoding_copies_no_weight() -> None:
    """No request for memory comes near the size of a layer's weights; reading a prompt copies one layer's at a time."""
    model = build_lively(SPACE).eval()
    decoder = Decoder(model, SPACE.subnet(smallest_choice(SPACE)), 40)
    layer = min(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 2)
    reading = allocations(lambda: decoder.feed([PROMPT]))
    step = allocations(lambda: decoder.feed([[1]]))
    assert max(reading) > 2 * layer, "a copy would be seen"
    assert max(step) < layer
