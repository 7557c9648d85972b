"""A sequence fed in pieces through the caches gives the logits of one pass without them, however it is cut."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from elastic.model.cache import ModelCache, empty_cache
from elastic.model.model import ElasticModel
from elastic.space.cost import Deployment, subnet_cost
from elastic.space.gates import Gates
from elastic.space.shape import Subnet
from tests.parity.model_factory import (
    EVERY_AXIS,
    SPACES,
    build_lively,
    choices_to_test,
    logits_of,
    one_process,
    relative_error,
    tokens_for,
)

LENGTH = 13  # three chunks of the tests' scan and one token


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def cuts(length: int, seed: int) -> list[int]:
    """Return the sizes of random pieces of `length` tokens: about half are single tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    while (left := length - sum(sizes)) > 0:
        wanted = int(torch.randint(1, 10, (), generator=generator))
        sizes.append(min(left, wanted if torch.rand((), generator=generator) < 0.5 else 1))
    return sizes


@torch.no_grad()
def logits_in_pieces(
    model: ElasticModel, tokens: Tensor, gates: Gates | None, cache: ModelCache, sizes: list[int]
) -> Tensor:
    """Feed the pieces one after another; returns logits [B, S, V]."""
    pieces = [
        model(piece, gates, cache=cache) @ model.head_weight(gates).T for piece in tokens.split(sizes, dim=1)
    ]  # each [s, B, V]
    return torch.cat(pieces).transpose(0, 1)


@pytest.mark.parametrize("name", SPACES)
def test_any_split_gives_the_logits_of_one_pass(name: str) -> None:
    """Random subnets with every axis reduced, dropped layers, per-layer widths; two sequences at once."""
    space = SPACES[name]
    model = build_lively(space).eval()
    tokens = tokens_for(space.parent, batch=2, length=LENGTH)
    subnets = [Subnet.full(space.parent), *(space.subnet(choice) for choice in choices_to_test(space))]
    for number, subnet in enumerate(subnets):
        gates = Gates.slice(subnet)
        expected = logits_of(model, tokens, gates).detach()
        splits = [[LENGTH], [1] * LENGTH, *(cuts(LENGTH, 10 * number + seed) for seed in range(2))]
        for sizes in splits:
            cache = empty_cache(space.parent, subnet, LENGTH, batch=2)
            actual = logits_in_pieces(model, tokens, gates, cache, sizes)
            assert relative_error(actual, expected) <= 1e-5, (number, sizes)
    assert len({gate.kept_layers for gate in subnets}) > 1


def test_the_split_is_exact_in_fp64() -> None:
    """What is left in fp32 is rounding: in fp64 the pieces agree to 1e-13 through the same code."""
    model = build_lively(EVERY_AXIS).eval().double()
    subnet = EVERY_AXIS.subnet(choices_to_test(EVERY_AXIS)[1])
    tokens, gates = tokens_for(EVERY_AXIS.parent, length=LENGTH), Gates.slice(subnet)
    cache = empty_cache(EVERY_AXIS.parent, subnet, LENGTH, batch=2, dtype=torch.float64)
    actual = logits_in_pieces(model, tokens, gates, cache, cuts(LENGTH, 3))
    assert relative_error(actual, logits_of(model, tokens, gates).detach()) <= 1e-13


def test_a_cache_of_another_sequence_matters() -> None:
    """The test above would pass with caches nobody reads, were the tokens before without influence."""
    space = EVERY_AXIS
    model, subnet = build_lively(space).eval(), space.subnet(choices_to_test(space)[0])
    gates = Gates.slice(subnet)
    last = []
    for first in (1, 2):
        tokens = tokens_for(space.parent, batch=1, length=LENGTH)
        tokens[0, 0] = first
        cache = empty_cache(space.parent, subnet, LENGTH)
        last.append(logits_in_pieces(model, tokens, gates, cache, [5, LENGTH - 5])[:, -1])
    assert relative_error(last[0], last[1]) > 1e-3


@pytest.mark.parametrize("name", SPACES)
def test_caches_hold_what_the_cost_table_counts(name: str) -> None:
    """Skipped layers and cut heads hold nothing. The table counts k convolution inputs, the cache needs k - 1."""
    space = SPACES[name]
    for choice in choices_to_test(space):
        subnet = space.subnet(choice)
        conditions = Deployment(batch=3, length_tokens=LENGTH, kv_bytes=2.0, ssm_bytes=4.0, conv_bytes=2.0)
        cost = subnet_cost(space.parent, subnet, conditions)
        cache = empty_cache(space.parent, subnet, LENGTH, batch=3, dtype=torch.bfloat16)
        taps = space.parent.conv_kernel
        num_bytes = sum(t.nbytes for layer in cache.layers.values() for t in vars(layer).values())
        assert num_bytes == cost.kv_bytes + cost.ssm_bytes + cost.conv_bytes * (taps - 1) / taps


def test_more_tokens_than_there_is_room_for_are_our_own_bug() -> None:
    model, subnet = build_lively(EVERY_AXIS).eval(), Subnet.full(EVERY_AXIS.parent)
    cache = empty_cache(EVERY_AXIS.parent, subnet, 4)
    tokens = tokens_for(EVERY_AXIS.parent, batch=1, length=5)
    with pytest.raises(AssertionError, match="5 tokens in a cache for 4"):
        logits_in_pieces(model, tokens, None, cache, [5])
    with pytest.raises(AssertionError, match="no gradients"):
        model(tokens, Gates.slice(subnet), cache=empty_cache(EVERY_AXIS.parent, subnet, 5))
