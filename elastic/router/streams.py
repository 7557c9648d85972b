"""Independent random streams: one generator for each (seed, purpose, numbers)."""

import hashlib

import torch


def stream(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of everything given.

    torch's CPU generator keeps 32 bits of a seed, so two streams coincide with a chance of one in 4 * 10^9.
    """
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
