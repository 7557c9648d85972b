"""Verbs in processes forked after the imports: for chains of many short runs, since imports take ten seconds each."""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from recipes.smoke import ROOT, Smoke

IMPORTED_ONCE = ["recipes._nemo", "recipes._verbs", "hydra.core.override_parser.overrides_parser"]


class ForkedSmoke(Smoke):
    """Runs verbs as `Smoke` does, by the same entry, one thread and one process each, without starting Python anew."""

    def start(self, verb: str, arguments: Sequence[str], threads: int, log: Path | None) -> tuple[int, float]:
        """Run one verb; returns its exit code and the seconds that a core worked for it."""
        assert threads == 1 and log is not None
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))  # of the server, which starts with the first verb
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_verb, args=(verb, list(arguments), log, sender))
        process.start()
        sender.close()
        process.join()
        seconds = receiver.recv() if receiver.poll() else 0.0
        return process.exitcode or 0, seconds


def _run_verb(verb: str, arguments: list[str], log: Path, sender: Connection) -> None:
    """Do what `python recipes/VERB.py ARGUMENTS > LOG` does, in this process."""
    began = time.process_time()
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    sys.argv = [str(ROOT / "recipes" / f"{verb}.py"), *arguments]
    from recipes._start import start

    try:
        start(verb)
    finally:
        sender.send(time.process_time() - began)
