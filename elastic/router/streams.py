"""Independent random streams: one generator for each (seed, purpose, numbers)."""

import hashlib

import torch


def stream(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator whose state is a hash of everything given: no two purposes or numbers share a stream."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
