"""The folders that legal configs name, and the way to a bad config's problems."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # else inside the fixtures: it needs Hydra, and the kernels' tests run on machines without
    from tests.unit.config.configs import ProblemsOf


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that INPUTS names, and parents permuted for other lanes."""
    from tests.unit.config.configs import written_manifest, written_record

    place = tmp_path_factory.mktemp("inputs")
    written_manifest(place / "text")
    (place / "folder").mkdir()
    written_record(place / "parent")
    written_record(place / "family", "elastic")
    for lanes in (1, 7):
        written_record(place / f"parent_{lanes}", lanes=lanes)
    return place


@pytest.fixture
def in_folders(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where the folders of INPUTS are, on one process without GPU; nothing is written there."""
    import torch

    monkeypatch.chdir(folders)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def problems_of(in_folders: None, monkeypatch: pytest.MonkeyPatch) -> "ProblemsOf":
    """Return what finds the problems of a changed config on the way the recipes go."""
    from tests.unit.config.configs import ProblemsOf

    return ProblemsOf(monkeypatch)
