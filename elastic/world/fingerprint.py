"""A number that says whether two tensors hold the same bits."""

import hashlib

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, its bits without a pattern; as a signed number
_CHUNK = 1 << 22  # values at a time, so that the 64-bit copies stay small beside a large embedding


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Return an int64 scalar on the tensor's device: the sum of its raw bits, each times an odd number of its place.

    Integer arithmetic modulo 2^64, so exact and without an order: one changed value always changes the result.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        places = torch.arange(start, start + part.numel(), device=tensor.device)
        total += (part * (2 * (_FACTOR * places) + 1)).sum()
    return total


def text_fingerprint(value: object) -> int:
    """Return the same kind of number for anything whose repr says all about it."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)
