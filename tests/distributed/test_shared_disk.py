"""What ranks see of one disk: nodes may list a folder differently for a while, and only rank 0 may fail."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from elastic.checkpoint import find as checkpoint_find
from elastic.checkpoint.contents import write_contents
from elastic.checkpoint.find import newest_whole, resolve_checkpoint
from elastic.world.groups import Layout, SharedFileError, decided_by_rank_0, join_world
from tests.distributed.harness import DistributedRunError, run_distributed


def found_behind_the_others(run, full):
    """Look while rank 1 does not see the newest checkpoint yet."""
    here = join_world(Layout(), torch.device("cpu"))
    listing = checkpoint_find.step_folders

    def stale(parent):
        return listing(parent) if here.is_main else listing(parent)[:-1]

    with mock.patch.object(checkpoint_find, "step_folders", stale):
        return newest_whole(run, full=full, world=here).name, resolve_checkpoint(run, full=full, world=here).name


@pytest.mark.parametrize("full", [True, False])
def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_sees(tmp_path: Path, full: bool) -> None:
    for step in (3, 6):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes([step]) * (2 << 20))
        write_contents(folder, {})
    assert run_distributed(found_behind_the_others, 2, tmp_path, full) == [("step_00000006", "step_00000006")] * 2


def write_where_nobody_may(path):
    here = join_world(Layout(), torch.device("cpu"))
    decided_by_rank_0(lambda: path.write_text("x"), here)


def test_all_ranks_hear_what_rank_0_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(DistributedRunError, match=r"No space left on device.*free space there") as caught:
        run_distributed(write_where_nobody_may, 2, tmp_path / "full")
    assert isinstance(caught.value.__cause__, SharedFileError) and "stopped: [0, 1]" in str(caught.value)
