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
        # Its own word, and not `exitcode`: of two threads that ask a fork server, one may be told 255.
        try:
            code, seconds = receiver.recv()
        except EOFError:  # killed
            code, seconds = None, 0.0
        process.join()
        return code if code is not None else process.exitcode or 1, seconds


def _run_verb(verb: str, arguments: list[str], log: Path, sender: Connection) -> None:
    """Do what `python recipes/VERB.py ARGUMENTS > LOG` does, in this process."""
    began, code = time.process_time(), 1
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    sys.argv = [str(ROOT / "recipes" / f"{verb}.py"), *arguments]
    from recipes._start import start

    try:
        start(verb)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        sender.send((code, time.process_time() - began))
