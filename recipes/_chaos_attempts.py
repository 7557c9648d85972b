"""Attempts at one run that are killed half-way: how they are started, when and whom SIGKILL hits, what is left over."""

import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Protocol

import psutil
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from recipes._chaos_report import MOMENTS, VICTIMS, ChaosError, Kill
from recipes._tiny_family import train_tiny_family

PROCESSES = 2
WAIT_FOR_END_S = 300.0
LATE_STEP_S, LATE_SAVE_S = 0.2, 0.1  # a kill comes up to that long after what it waits for


class Agent(Protocol):
    """The process that starts and watches the workers."""

    pid: int | None

    def is_running(self) -> bool: ...


class ForkedAgent:
    """torchrun's agent and workers, forked from this process (or from `context`'s server): its imports, the dear part
    of a start, are made once. Each worker calls `main(values)`, and gets SIGINT from the kernel when the agent dies."""

    def __init__(
        self,
        values: dict[str, Any],
        log: Path,
        main: Callable[[dict[str, Any]], None] = train_tiny_family,
        context: BaseContext | None = None,
    ) -> None:
        context = context or multiprocessing.get_context("fork")
        self._process = context.Process(target=_agent_main, args=(values, log, main))  # type: ignore[attr-defined]
        self._process.start()
        self.pid = self._process.pid

    def is_running(self) -> bool:
        """Tell whether the agent still runs."""
        return bool(self._process.is_alive())

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the agent; returns its exit code (negative: the signal that ended it), None if it still runs."""
        self._process.join(timeout_s)
        code: int | None = self._process.exitcode
        return code


class FreshAgent:
    """`python -m torch.distributed.run`, as a user starts it."""

    def __init__(self, values: dict[str, Any], log: Path) -> None:
        file = log.with_suffix(".json")
        file.write_text(json.dumps(values))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*launcher, "-m", "recipes._tiny_worker", str(file)], stdout=output, stderr=output
            )
        self.pid: int | None = self._process.pid

    def is_running(self) -> bool:
        """Tell whether the agent still runs."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the agent; returns its exit code (negative: the signal that ended it), None if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None


def _agent_main(values: dict[str, Any], log: Path, main: Callable[[dict[str, Any]], None]) -> None:
    gc.freeze()  # a collection in a worker would look at all that was imported before, and so copy its pages
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=PROCESSES,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(settings, main)(values)


class Attempts:
    """Starts a run again and again and kills it at moments drawn from `draw`; a start takes about `start_s`."""

    def __init__(self, start: Callable[[dict[str, Any], Path], Agent], draw: random.Random, start_s: float) -> None:
        self.start, self.draw, self.start_s = start, draw, start_s

    def run(self, values: dict[str, Any], *, kill: bool) -> Kill | None:
        """Make one attempt; returns the kill, or None when the run came to its end before it. No process is left."""
        manager = values["exp_manager"]
        folder = Path(manager["exp_dir"]) / manager["name"] / manager["version"]
        agent = self.start(values, folder.with_suffix(".log"))
        assert agent.pid is not None
        family = {psutil.Process(agent.pid)}
        try:
            done = self._wait_and_kill(agent, folder, family) if kill else None
        finally:
            _wait_for_end(agent, family, folder)
        if done is None and not (folder / "finished.json").is_file():
            raise ChaosError(f"{folder}: an attempt that nobody killed failed; see {folder.with_suffix('.log')}")
        return done

    def _wait_and_kill(self, agent: Agent, folder: Path, family: set[psutil.Process]) -> Kill | None:
        moment, victim = self.draw.choice(MOMENTS), self.draw.choice(VICTIMS)
        count, share = self.draw.randint(1, 3), self.draw.random()
        delay_s = share * {"start": self.start_s, "step": LATE_STEP_S, "save": LATE_SAVE_S}[moment]
        at_first, old, saves = _logged(folder), _unfinished(folder), set[int]()

        def happened() -> bool:
            saves.update(_unfinished(folder) - old)
            return {"start": True, "step": _logged(folder) >= at_first + count, "save": len(saves) >= count}[moment]

        if not _until(happened, agent) or not _until(lambda: False, agent, delay_s):
            return None
        family |= _with_descendants(family)
        in_save, victims = bool(_unfinished(folder) - old), _victims(agent, victim, family)
        for process in victims:
            _end(process)
        return Kill(moment, victim, _logged(folder), in_save) if victims else None


def _until(happened: Callable[[], bool], agent: Agent, wait_s: float | None = None) -> bool:
    """Wait until something has happened or, where `wait_s` is given, that long; False when the agent ends first."""
    deadline_s = time.monotonic() + (WAIT_FOR_END_S if wait_s is None else wait_s)
    while agent.is_running():
        if happened():
            return True
        if time.monotonic() > deadline_s:
            if wait_s is None:
                raise ChaosError(f"nothing happened in {WAIT_FOR_END_S:g} s")
            return True
        time.sleep(0.002)
    return False


def _logged(folder: Path) -> int:
    rows = folder / "metrics.jsonl"
    return rows.read_bytes().count(b"grad_norm") if rows.exists() else 0


def _unfinished(folder: Path) -> set[int]:
    """Return the checkpoints that are half-way, by a number of their own: an earlier kill may have left one."""
    found = set()
    for path in (folder / "checkpoints").glob("*.writing"):
        with contextlib.suppress(FileNotFoundError):  # it has just become whole
            found.add(path.stat().st_ino)
    return found


def _victims(agent: Agent, victim: str, family: set[psutil.Process]) -> list[psutil.Process]:
    """Return the processes to kill; of everything, the agent first, so that it cannot act on the rest."""
    alive = sorted((process for process in family if _is_alive(process)), key=lambda process: process.pid)
    if victim == "everything":
        return alive
    if victim == "agent":
        return [process for process in alive if process.pid == agent.pid]
    workers = [process for process in alive if _parent(process) == agent.pid]
    return workers if victim == "both workers" else workers[int(victim[-1]) :][:1]


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def _wait_for_end(agent: Agent, family: set[psutil.Process], folder: Path) -> None:
    """Wait until the agent and everything that came from it is gone; raises ChaosError for what stays."""
    deadline_s = time.monotonic() + WAIT_FOR_END_S
    while True:
        family |= _with_descendants(family)
        left = [process for process in family if _is_alive(process)]
        if not left and not agent.is_running():
            return
        if time.monotonic() > deadline_s:
            for process in left:
                _end(process)
            raise ChaosError(f"{folder}: processes {[process.pid for process in left]} were left behind")
        time.sleep(0.1)  # each look reads all processes of the machine


def _with_descendants(family: set[psutil.Process]) -> set[psutil.Process]:
    found = set(family)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(process.children(recursive=True))
    return found
