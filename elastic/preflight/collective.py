"""Let every rank of a job meet every other once, before the run starts (`torchrun ... -m` this module).

Three things fail here in seconds that would otherwise fail in the first step or at the first checkpoint, with a trace
of somebody else's code: a rank that cannot reach the others, a sum that comes out wrong, and a run folder that is not
the same disk on every node.
"""

import argparse
import datetime
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic.config.load import Problem
from elastic.world.files import nearest_existing

EXIT_PROBLEM = 2
NUM_ELEMENTS = 1 << 20  # 4 MiB: large enough to leave NCCL's path for tiny messages
TIMEOUT_S = 240.0  # below the launchers' own limit, so that this message comes first
VISIBLE_WITHIN_S = 30.0  # how long a network file system may take to show a new file on another node


class CollectiveProblem(ValueError):
    """Ranks that cannot work together."""


def check_collectives(folder: Path, timeout_s: float) -> float:
    """Sum over all ranks and look for one rank's file on every node; returns the seconds of the second sum.

    Takes the ranks from torchrun's environment. `folder` is the run folder; it is neither made nor written to, the
    probe lies in the nearest folder above it that exists. Raises CollectiveProblem with the problem in one line.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
        seconds = _sum_twice(device)
        _share_a_file(folder)
    except RuntimeError as error:
        rank, backend = os.environ["RANK"], "NCCL" if cuda else "gloo"
        rule = f"rank {rank} of {os.environ['WORLD_SIZE']} failed ({str(error).splitlines()[0]})"
        remedy = f"check {backend}_SOCKET_IFNAME, firewall and fabric between the nodes"
        raise CollectiveProblem(Problem("all-reduce", socket.gethostname(), rule, remedy)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return seconds


def _sum_twice(device: torch.device) -> float:
    """Sum the rank numbers; the first time sets the connections up, the second is timed."""
    world = dist.get_world_size()
    for _ in range(2):
        ranks = torch.full((NUM_ELEMENTS,), float(dist.get_rank()), device=device)
        started = time.perf_counter()
        dist.all_reduce(ranks)
        expected = world * (world - 1) / 2
        if not bool((ranks == expected).all()):  # waits for the device
            rule = f"the sum of the rank numbers is {float(ranks[0]):g} instead of {expected:g}"
            remedy = "a GPU or a link computes wrongly: leave the node out with sbatch --exclude"
            raise CollectiveProblem(Problem("all-reduce", socket.gethostname(), rule, remedy))
    return time.perf_counter() - started


def _share_a_file(folder: Path) -> None:
    """Write a file on rank 0 where the run will be written, and look for it on every rank."""
    box = [""]
    if dist.get_rank() == 0:
        existing = nearest_existing(folder)
        box = [str(existing / f".preflight_{os.getpid()}_{time.time_ns()}")]
        Path(box[0]).touch()
    dist.broadcast_object_list(box, src=0)
    probe = Path(box[0])
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(blind, None if probe.exists() else socket.gethostname())
    if dist.get_rank() == 0:
        probe.unlink()
    hosts = sorted({host for host in blind if host is not None})
    if hosts:
        rule = f"is not the same folder on {', '.join(hosts)} as on the first node"
        remedy = "choose an exp_manager.exp_dir on a file system that all nodes share"
        raise CollectiveProblem(Problem("run folder's disk", str(probe.parent), rule, remedy))


def main() -> None:
    """Check, print one line, and leave with code 2 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="the run folder, there or not")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help=f"seconds (default {TIMEOUT_S:g})")
    arguments = parser.parse_args()
    try:
        seconds = check_collectives(arguments.folder.absolute(), arguments.timeout)
    except CollectiveProblem as error:
        print(f"  {error}", flush=True)
        sys.exit(EXIT_PROBLEM)
    if os.environ.get("RANK", "0") == "0":
        size = os.environ.get("WORLD_SIZE", "1")
        print(f"all-reduce of {4 * NUM_ELEMENTS >> 20} MiB over {size} ranks: {seconds * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
