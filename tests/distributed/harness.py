"""Runs a plain function on several gloo processes of this machine and hands back what each rank returned.

The processes are forked from a server that has already imported torch and Megatron-Core, so a run costs tenths of a
second instead of the imports' seconds per rank. A rank's arguments, result, failure and output travel through files of
a temporary folder, so that tensors need no shared memory and a killed rank leaves its output behind.
"""

import contextlib
import datetime
import faulthandler
import gc
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_all_start_methods, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, by the fork server, with all that training imports, also when it first runs, and what an export is
# checked with; whatever a test module needs beyond these is imported again by every rank. A name that does not exist
# is skipped.
PRELOAD = (
    "__main__",
    "pytest",
    "torch.distributed",
    "torch.utils.serialization",
    "torch.profiler._cupti_monitor",
    "megatron.core.models.mimo.optimizer",
    "numpy.ctypeslib",
    "rich._emoji_codes",
    "transformers.models.nemotron_h.modeling_nemotron_h",
    "tests.distributed.training",
)
# Forked children must not inherit thread pools, and two cores are soon oversubscribed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
# How long the other ranks may take to report after one has failed: peers notice a closed connection at once.
GRACE_S = 3.0
LOG_TAIL_CHARACTERS = 4000


class DistributedRunError(RuntimeError):
    """A rank that raised or died; the message holds the first failing rank's traceback, `ranks` all that failed."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class DistributedTimeoutError(DistributedRunError, TimeoutError):
    """Ranks that had not returned in time; the message shows where each of them stood."""


@dataclass(frozen=True)
class _Failure:
    """How a rank failed: when (seconds, machine-wide monotonic clock), its exception (if it pickles), its traceback."""

    time_s: float
    exception: BaseException | None
    text: str


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 280.0,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` gloo ranks of the CPU and return their results, by rank.

    `fn` is a function of an importable module; arguments and results are anything `torch.save` takes. Inside, the
    default process group is up, RANK, LOCAL_RANK and WORLD_SIZE are set, one thread per rank; `env` adds variables
    (those the fork server's imports read have no effect any more).

    Raises DistributedRunError with the first failing rank's traceback (its exception as `__cause__`) and
    DistributedTimeoutError after `timeout_s`; no process outlives the call.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks_"))
    try:
        torch.save((fn, args, kwargs), folder / "call")
        deadline_s = time.monotonic() + timeout_s
        ranks = _start(folder, world_size, deadline_s, {**(env or {})})
        try:
            _wait(folder, ranks, deadline_s)
        finally:
            _end(ranks)
        _raise_failures(folder, ranks, out_of_time=time.monotonic() >= deadline_s)
        return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(world_size)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, world_size: int, deadline_s: float, env: dict[str, str]) -> list[BaseProcess]:
    """Start one process per rank."""
    with fork_server() as context:
        ranks = [
            context.Process(target=_rank_main, args=(folder, rank, world_size, deadline_s, env), name=f"rank {rank}")
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
    return ranks


@contextlib.contextmanager
def fork_server() -> Iterator[Any]:
    """Give the multiprocessing context whose processes are forked from the server; start them inside the block."""
    context: Any
    with _environment(ENVIRONMENT):
        if "forkserver" in get_all_start_methods():
            context = get_context("forkserver")
            context.set_forkserver_preload(list(PRELOAD))
            forkserver.ensure_running()
        else:
            context = get_context("spawn")
        yield context


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait(folder: Path, ranks: Sequence[BaseProcess], deadline_s: float) -> None:
    """Return when every rank has ended, a moment after one has failed, or just after the deadline."""
    running = {rank: process.sentinel for rank, process in enumerate(ranks)}
    # A rank ends itself at the deadline and writes where it stood; the second more is for that.
    until_s = deadline_s + 1.0
    while running and (left_s := until_s - time.monotonic()) > 0:
        ended = connection.wait(running.values(), timeout=left_s)
        for rank in [rank for rank, sentinel in running.items() if sentinel in ended]:
            del running[rank]
            if not (folder / f"result_{rank}").exists():
                until_s = min(until_s, time.monotonic() + GRACE_S)


def _end(ranks: Sequence[BaseProcess]) -> None:
    """Kill what still runs, with everything it started, and collect it."""
    for process in ranks:
        if process.pid is None:  # never started
            continue
        with contextlib.suppress(ProcessLookupError):  # already gone, or not yet the leader of its own group
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _raise_failures(folder: Path, ranks: Sequence[BaseProcess], out_of_time: bool) -> None:
    """Raise for the rank that failed first, else for ranks that ran out of time, else for ranks that died."""
    missing = [rank for rank in range(len(ranks)) if not (folder / f"result_{rank}").exists()]
    if not missing:
        return
    failures = {
        rank: pickle.loads((folder / f"failure_{rank}").read_bytes())
        for rank in missing
        if (folder / f"failure_{rank}").exists()
    }
    if failures:
        first = min(failures, key=lambda rank: failures[rank].time_s)
        output = _tail(folder / f"log_{first}")
        message = f"rank {first} of {len(ranks)} failed (failed or stopped: {missing})\n{failures[first].text}{output}"
        raise DistributedRunError(message, missing) from failures[first].exception
    ended = "".join(
        f"\nrank {rank}, exit code {ranks[rank].exitcode}{_tail(folder / f'log_{rank}')}" for rank in missing
    )
    if out_of_time:
        raise DistributedTimeoutError(f"ranks {missing} of {len(ranks)} did not return in time{ended}", missing)
    raise DistributedRunError(f"ranks {missing} of {len(ranks)} ended without a result{ended}", missing)


def _tail(path: Path) -> str:
    """Return the end of a rank's output, under a heading."""
    text = path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:] if path.exists() else ""
    return f"\n--- its output ---\n{text}" if text.strip() else ""


def _rank_main(folder: Path, rank: int, world_size: int, deadline_s: float, env: dict[str, str]) -> None:
    """Be one rank: redirect output, join the group, call the function, leave its result or its failure in a file."""
    os.setsid()  # so that whatever this rank starts can be killed with it
    gc.freeze()  # a collection would look at all that the server has imported, and so copy its pages
    log = os.open(folder / f"log_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # At the deadline: write every thread's stack to the log and end, even if the parent is gone by then.
    faulthandler.dump_traceback_later(max(deadline_s - time.monotonic(), 0.01), exit=True, file=log)
    try:
        os.environ.update(env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)})
        torch.set_num_threads(1)
        # The group's own time-out comes later, so that the deadline above tells where the rank stood.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=max(deadline_s - time.monotonic(), 0.0) + 60.0),
        )
        # A rank whose function ends at once would close connections that another is still making.
        (folder / f"joined_{rank}").touch()
        while not all((folder / f"joined_{other}").exists() for other in range(world_size)):
            time.sleep(0.005)
        fn, args, kwargs = torch.load(folder / "call", weights_only=False)
        result = fn(*args, **kwargs)
        # Written aside and renamed: a result that cannot be saved must not look like one.
        torch.save(result, folder / f"partial_{rank}")
        os.replace(folder / f"partial_{rank}", folder / f"result_{rank}")
        dist.destroy_process_group()
    except BaseException as error:
        _write_failure(folder / f"failure_{rank}", error)
        sys.stdout.flush()
        os._exit(1)  # peers see the connection close at once; a clean-up could wait for them
    finally:
        faulthandler.cancel_dump_traceback_later()


def _write_failure(path: Path, error: BaseException) -> None:
    """Write how this rank failed, without the exception object if it does not survive pickling."""
    text = "".join(traceback.format_exception(error))
    now_s = time.monotonic()
    try:
        payload = pickle.dumps(_Failure(now_s, error, text))
        pickle.loads(payload)
    except Exception:
        payload = pickle.dumps(_Failure(now_s, None, text))
    path.with_suffix(".partial").write_bytes(payload)
    path.with_suffix(".partial").rename(path)
