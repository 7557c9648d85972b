"""Says which rank and step stopped, and ends a process that no longer gets anywhere.

A thread on every rank sends a sign of life to the store that torch.distributed started with (it works while
collectives hang). A rank that does one thing for longer than `timeout_s` prints where it stands, with the stacks of all
threads, to stderr and to <run folder>/watchdog/rank_R.txt, compares the signs of life of all ranks, and ends with
EXIT_STALLED; the launcher then ends the others. A rank that another left alone in a collective says the same as its
error passes. A stopped or killed rank cannot speak: the others name it.
"""

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from elastic.world.files import first_few

EXIT_STALLED = 75  # EX_TEMPFAIL: starting again may help
WATCHDOG_FOLDER = "watchdog"
BEATS_PER_TIMEOUT = 20
MAX_BEAT_S = 2.0
END_ANYWAY_S = 60.0  # in case even the report hangs, on a dead disk for example
MAX_NAMED = 8


@dataclass
class Progress:
    """What this rank's main thread does; written by the loop, read by the watchdog's thread."""

    mark: tuple[int, int, str] = (0, 0, "starting")

    def enter(self, step: int, doing: str) -> None:
        """Note that something else begins; steps count from 1 as in metrics.jsonl."""
        # One assignment of one tuple, so that a reader never sees half of it.
        self.mark = (self.mark[0] + 1, step, doing)


class Sign(NamedTuple):
    """A sign of life: its number, how many things its rank has begun, in which step, doing what. Stored as JSON."""

    beat: int
    begun: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


def verdict(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> str:
    """Say which ranks stopped, from the signs of all ranks read twice, some beats apart (None: never one)."""
    silent = [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if new is None or old == new]
    alive = {rank: sign for rank, sign in enumerate(after) if sign is not None and rank not in silent}
    failed = {rank: sign for rank, sign in alive.items() if sign.doing.startswith("failed")}
    parts = [f"rank {rank} gives no sign of life, last seen at {after[rank] or 'its start'}" for rank in silent]
    behind = min((sign.begun for rank, sign in alive.items() if rank not in failed), default=0)
    front = max((sign.begun for sign in after if sign is not None), default=0)
    if not silent:
        parts += [f"rank {rank} {sign.doing} in step {sign.step}" for rank, sign in failed.items()]
        late = {rank: sign for rank, sign in alive.items() if rank not in failed and sign.begun == behind < front}
        parts += [f"rank {rank} is behind the others, at {sign}" for rank, sign in late.items()]
    if not parts:
        where = next(iter(alive.values()), None)
        return f"all {len(after)} ranks are alive and stand at the same point, {where}"
    return "; ".join(first_few(parts, MAX_NAMED, "more ranks"))


@dataclass
class Watchdog:
    """Watches one rank for the time of a `with` block; joins its thread on the way out."""

    progress: Progress
    run_folder: Path
    timeout_s: float
    _beat: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _failure: str | None = None

    def __post_init__(self) -> None:
        self.rank, self.num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.beat_s = min(self.timeout_s / BEATS_PER_TIMEOUT, MAX_BEAT_S)

    def __enter__(self) -> "Watchdog":
        # A connection of its own: the main thread may be waiting inside the first one.
        own = _get_default_store().clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        self._store = PrefixStore(WATCHDOG_FOLDER, own)
        self._store.set_timeout(timedelta(seconds=max(5 * self.beat_s, 1.0)))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # An error of torch.distributed says that somebody was waited for in vain, not who.
        if error is not None:
            self._failure = f"failed: {type(error).__name__}"
            self._send()
            if isinstance(error, RuntimeError) and self.num_ranks > 1:
                _, step, doing = self.progress.mark
                self._say(f" failed in step {step}, {doing}: {self._verdict()}")
        self._stop.set()
        assert self._thread is not None
        self._thread.join(timeout=END_ANYWAY_S)

    def _watch(self) -> None:
        """Send signs of life, and act when the main thread has not begun anything new for too long.

        Time is counted in beats, so a machine that slept, or a process that was stopped and woken, is not judged by
        the time it could not run.
        """
        mark, beats_at_mark = self.progress.mark, 0
        while not self._stop.is_set():
            self._send()
            beats_at_mark = beats_at_mark + 1 if self.progress.mark == mark else 0
            mark = self.progress.mark
            if beats_at_mark * self.beat_s > self.timeout_s and self._failure is None:
                self._end(mark)
            self._stop.wait(self.beat_s)

    def _send(self) -> None:
        self._beat += 1
        begun, step, doing = self.progress.mark
        sign = Sign(self._beat, begun, step, self._failure or doing)
        with contextlib.suppress(RuntimeError):  # the store's rank is gone or slow: this rank's own clock runs on
            self._store.set(str(self.rank), json.dumps(sign))

    def _end(self, mark: tuple[int, int, str]) -> None:
        """Report and end this process, whatever its main thread is stuck in; let it live if it moves on meanwhile."""
        faulthandler.dump_traceback_later(END_ANYWAY_S, exit=True)
        _, step, doing = mark
        try:
            header = self._say(f" has made no progress for {self.timeout_s:g} s: step {step}, {doing}")
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
            found = self._verdict()
            self._say(f": {found}")
            if self.progress.mark != mark:
                self._say(f" goes on after all, at step {self.progress.mark[1]}")
                faulthandler.cancel_dump_traceback_later()
                return
            folder = self.run_folder / WATCHDOG_FOLDER
            folder.mkdir(exist_ok=True)
            with (folder / f"rank_{self.rank}.txt").open("a") as file:
                file.write(f"{header}\n{found}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            for child in psutil.Process().children(recursive=True):  # of a checkpoint that was being written
                child.kill()
        except Exception as error:
            self._say(f": no full report, {error!r}")
        os._exit(EXIT_STALLED)

    def _verdict(self) -> str:
        """Read all signs of life twice and say who stopped."""
        if self.num_ranks == 1:
            return "it is alone: nothing another rank did is missing"
        try:
            before = self._signs()
            # Several beats apart, this rank's own among them while it reads in the watchdog's thread.
            for _ in range(5):
                time.sleep(self.beat_s)
                self._send()
            return verdict(before, self._signs())
        except RuntimeError as error:
            return f"the store with all signs of life does not answer, so its rank or launcher stopped ({error})"

    def _signs(self) -> list[Sign | None]:
        keys = [str(rank) for rank in range(self.num_ranks)]
        found = [key for key in keys if self._store.check([key])]
        values = dict(zip(found, self._store.multi_get(found), strict=True))
        return [Sign(*json.loads(values[key])) if key in values else None for key in keys]

    def _say(self, what: str) -> str:
        """Print to stderr at once what there is to say of this rank; returns the line."""
        line = f"watchdog: rank {self.rank} on {platform.node()}{what}"
        print(line, file=sys.stderr, flush=True)
        return line
