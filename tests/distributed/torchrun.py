"""torchrun's agent with two workers on this machine, watched and told things by a test."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from recipes._chaos_attempts import ForkedAgent, FreshAgent
from tests.distributed.harness import fork_server

START_S = 240.0  # generous: a busy machine


class Torchrun:
    """One agent at work. A `with` block leaves no process behind."""

    def __init__(self, values: dict[str, Any], log: Path, main: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Start a run as a user would; with `main`, which each worker calls with `values`, from the tests' fork server
        in tenths of a second instead."""
        self.log, manager = log, values["exp_manager"]
        self.run_folder = Path(manager["exp_dir"]) / manager["name"] / manager["version"]
        self._agent: ForkedAgent | FreshAgent
        if main is None:
            self._agent = FreshAgent(values, log)
        else:
            with fork_server() as context:
                self._agent = ForkedAgent(values, log, main, context)
        self.agent = psutil.Process(self._agent.pid)
        self._family = {self.agent}

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left():
            process.kill()
        self._agent.wait(START_S)

    @property
    def output(self) -> str:
        """Return what agent and workers have printed."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def workers(self) -> list[psutil.Process]:
        """Return the workers, by rank."""
        children = sorted(self.agent.children(), key=lambda process: process.pid)
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    def wait_for_step(self, step: int) -> None:
        """Wait until a step has been logged."""
        metrics = self.run_folder / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened; fails when the agent ends before."""
        until_s = time.monotonic() + START_S
        while not happened():
            assert self._agent.is_running() and time.monotonic() < until_s, self.output
            time.sleep(0.02)

    def end(self, timeout_s: float = 120.0) -> int | None:
        """Wait for the agent's own end; returns its exit code."""
        until_s = time.monotonic() + timeout_s
        while self._agent.is_running() and time.monotonic() < until_s:
            self.left()
            time.sleep(0.2)  # each look reads all processes of the machine
        return self._agent.wait(0.0)

    def left(self) -> list[psutil.Process]:
        """Return the processes of this run that still live, whoever started them."""
        for process in list(self._family):
            try:
                self._family.update(process.children(recursive=True))
            except psutil.NoSuchProcess:
                continue
        return [process for process in self._family if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
