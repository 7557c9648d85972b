"""What a training run is made from, as checksums: the same path may hold something else on the next day."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.data.manifest import Manifest

SAMPLED_BYTES = 64 * 1024
REPLICAS, CHANGES = "replicas", "changes"


def describe_origin(data: Manifest, replicas: int, permuted_parent: Path | None = None) -> dict[str, Any]:
    """Return what goes into a checkpoint beside the config: checksums of the inputs, and the number of replicas.

    Reads data.json, and of the permuted parent its record and a sample of its files.
    """
    inputs = {"data.path (tokenizer)": data.tokenizer.sha256}
    for name, split in data.splits.items():
        inputs[f"data.path ({name} split)"] = _joined({file: record.sha256 for file, record in split.files.items()})
    if permuted_parent is not None:
        inputs["init_from.permuted_parent"] = weights_sha256(permuted_parent)
    return {"inputs": inputs, REPLICAS: replicas}


def weights_sha256(checkpoint: Path) -> str:
    """Hash the names and sizes of a checkpoint's tensor files, and 64 KiB from the middle of each."""
    parts = {}
    for path in sorted(checkpoint.glob("*.distcp")):
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, (size - SAMPLED_BYTES) // 2))
            parts[path.name] = f"{size}:{hashlib.sha256(stream.read(SAMPLED_BYTES)).hexdigest()}"
    return _joined(parts)


def _joined(parts: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {text}" for name, text in sorted(parts.items())).encode()).hexdigest()
