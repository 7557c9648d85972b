"""The multi-process harness itself: order of results, failures that surface, nothing left behind."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import DistributedRunError, DistributedTimeoutError, run_distributed

TOO_LONG_S = 600  # a test that waits for this has failed, however busy the machine is


def _sum_of_ranks(offset: torch.Tensor, scale: float = 1.0) -> tuple[int, torch.Tensor, int]:
    total = offset + scale * dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total, torch.get_num_threads()


def _fail_on_rank_1() -> None:
    print("words before the end", flush=True)
    if dist.get_rank() == 1:
        raise ValueError("rank one does not like this")
    time.sleep(TOO_LONG_S)


def _die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def _hang_on_rank_1(pid_file: str) -> None:
    if dist.get_rank() == 1:
        # A grandchild too: a killed rank must not leave one behind.
        grandchild = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({TOO_LONG_S})"])
        with open(pid_file, "w") as file:
            file.write(f"{os.getpid()} {grandchild.pid}")
        time.sleep(TOO_LONG_S)


def _alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    results = run_distributed(_sum_of_ranks, world_size, torch.tensor([1.0, 2.0]), scale=2.0)
    ranks = world_size * (world_size - 1)
    assert [rank for rank, _, _ in results] == list(range(world_size))
    for _, total, num_threads in results:
        assert total.tolist() == [world_size + ranks, 2 * world_size + ranks]
        assert num_threads == 1


def test_exception_surfaces_with_the_childs_traceback() -> None:
    started_s = time.monotonic()
    with pytest.raises(DistributedRunError, match="rank 1 of 2 failed") as caught:
        run_distributed(_fail_on_rank_1, 2, timeout_s=TOO_LONG_S)
    assert time.monotonic() - started_s < TOO_LONG_S, "a failure must not wait for the others, nor for the time-out"
    assert "rank one does not like this" in str(caught.value)
    assert "_fail_on_rank_1" in str(caught.value) and "words before the end" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_function_that_does_not_pickle_is_refused_at_once() -> None:
    with pytest.raises(Exception, match="pickle"):
        run_distributed(lambda: None, 2)


def test_silent_death_is_reported() -> None:
    with pytest.raises(DistributedRunError) as caught:
        run_distributed(_die_on_rank_0, 2)
    assert 0 in caught.value.ranks


def test_hung_rank_is_killed_with_its_children_at_the_timeout(tmp_path: object) -> None:
    pid_file = f"{tmp_path}/pids"
    for timeout_s in (8, 60, 240):  # until the rank has come as far as to hang, beside whatever else is running
        with pytest.raises(DistributedTimeoutError) as caught:
            run_distributed(_hang_on_rank_1, 2, pid_file, timeout_s=timeout_s)
        if caught.value.ranks == [1] and os.path.exists(pid_file):
            break
    assert caught.value.ranks == [1]
    assert "_hang_on_rank_1" in str(caught.value), "the message shows where the rank stood"
    with open(pid_file) as file:
        pids = [int(pid) for pid in file.read().split()]
    deadline_s = time.monotonic() + TOO_LONG_S
    while any(map(_alive, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def test_environment_reaches_the_ranks() -> None:
    assert run_distributed(os.getenv, 2, "HARNESS_PROBE", env={"HARNESS_PROBE": "seen"}) == ["seen", "seen"]
