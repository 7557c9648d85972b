"""Settings that every test shares: one thread, fixed seeds, no compiler, GPU tests only where there is a GPU."""

import gc
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import mounted_disk


def pytest_collectstart() -> None:
    """Set torch up before any test module, in the processes that run tests: the one that deals them out needs none."""
    import torch

    if not torch.cuda.is_available():
        # Megatron-Core's fused functions otherwise compile C++ at their first call.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Triton's kernels run in its interpreter; it looks when it is first imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    gc.disable()  # a collection looks at all that the test modules import, ever more


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, whichever tests ran before."""
    import numpy
    import torch

    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)


@pytest.fixture(autouse=True, scope="session")
def started_s() -> float:
    """Return when the tests began."""
    return time.monotonic()


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest, started_s: float) -> None:
    """Skip what `--seconds` leaves no time for."""
    seconds = request.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - started_s > seconds:
        pytest.skip(f"left out: the {seconds:.0f} s of this run (--seconds) are over")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="marked gpu: no CUDA device on this machine"))


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let the golden losses be rewritten on purpose, and a run end in time; do without pytest-timeout if need be."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt from this run")
    parser.addoption("--seconds", type=float, help="skip what has not begun so many seconds after the start")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds for one test, held by pytest-timeout where that is installed")


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
