"""Settings that every test shares: one thread, fixed seeds, no compiler, GPU tests only where there is a GPU."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from tests.disks import mounted_disk

if not torch.cuda.is_available():
    # Megatron-Core's fused functions otherwise compile C++ at their first call.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Triton's kernels run in its interpreter; it looks when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, whichever tests ran before."""
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="marked gpu: no CUDA device on this machine"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the golden losses be rewritten on purpose."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt from this run")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a tiny corpus, a trained parent and its permuted copy once for all tests that train a family."""
    from tests.distributed.harness import run_distributed
    from tests.distributed.training import prepare_start

    folder = tmp_path_factory.mktemp("chain")
    run_distributed(prepare_start, 1, folder)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 8 MiB; skips where that is not allowed."""
    with mounted_disk(tmp_path / "small_disk", "8m") as folder:
        yield folder
