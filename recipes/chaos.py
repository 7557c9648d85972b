"""Kill a training run again and again and see that nothing is lost.

    python recipes/chaos.py --kills 50            # starts forked from one process that has made the imports
    python recipes/chaos.py --kills 50 --fresh    # every start a `python -m torch.distributed.run` of its own

Hardware: two CPU cores, shared. Time for 50 kills: 6 minutes; with --fresh 12. Expected: `equal`
behind every round, exit code 0.

A tiny family is trained by two processes under torchrun's agent, once without interruption and then in rounds: SIGKILL
hits one worker, both, the agent, or everything, while they start, between steps, or inside a save; the same command is
run again until the run is finished, then the next round begins, until the wanted kills have been counted. At the end of
each round its files are compared with those of the uninterrupted run: every logged number, and every byte of the last
checkpoint's weights, optimizer state and router. No process of a killed attempt may be left.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from recipes._chaos_report import ChaosError, Kill, differing, kill_table

# Read when torch is imported, so that happens later. Two workers share two cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def chaos(
    folder: Path, kills: int, seed: int, fresh: bool, console: Console
) -> tuple[list[Kill], dict[str, list[str]]]:
    """Run rounds until `kills` attempts were killed; returns the kills and, by round, what differs."""
    from recipes._chaos_attempts import Attempts, ForkedAgent, FreshAgent
    from recipes._tiny_family import tiny_family_values

    agent = FreshAgent if fresh else ForkedAgent
    draw = random.Random(seed)
    reference = tiny_family_values(folder, "reference")
    started_s = time.monotonic()
    Attempts(agent, draw, 0.0).run(reference, kill=False)
    attempts = Attempts(agent, draw, start_s=0.5 * (time.monotonic() - started_s))
    done: list[Kill] = []
    rounds: dict[str, list[str]] = {}
    while len(done) < kills:
        name = f"round_{len(rounds)}"
        values, before = tiny_family_values(folder, name), len(done)
        while (kill := attempts.run(values, kill=len(done) < kills)) is not None:
            done.append(kill)
        rounds[name] = differing(folder / "run" / name, folder / "run" / "reference")
        result = ", ".join(rounds[name]) or "equal"
        console.print(f"{name}: {len(done) - before} kills, {len(done)} of {kills} in all: {result}", highlight=False)
    return done, rounds


def main() -> None:
    """Parse the command line, prepare, kill, compare; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many attempts to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=1, help="decides moments and victims (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="start every attempt with a command of its own")
    parser.add_argument("--folder", type=Path, help="a new folder to work in and keep (default: a temporary one)")
    arguments = parser.parse_args()
    os.environ |= {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    console = Console()
    with tempfile.TemporaryDirectory(prefix="chaos_") as temporary:
        folder = Path(temporary) if arguments.folder is None else arguments.folder
        if arguments.folder is not None:
            folder.mkdir(parents=True)  # an existing one is not touched
        prepare_apart(folder)
        started_s = time.monotonic()
        try:
            kills, rounds = chaos(folder, arguments.kills, arguments.seed, arguments.fresh, console)
        except ChaosError as error:
            console.print(str(error), style="bold red", highlight=False)
            sys.exit(1)
        console.print(kill_table(kills, time.monotonic() - started_s))
        sys.exit(1 if any(rounds.values()) else 0)


def prepare_apart(folder: Path) -> None:
    """Prepare in a process of its own: attempts are forked from this one, which must stay free of threads."""
    import multiprocessing

    from recipes._tiny_family import prepare_tiny_family

    process = multiprocessing.get_context("fork").Process(target=prepare_tiny_family, args=(folder,))
    process.start()
    process.join()
    if process.exitcode:
        raise ChaosError(f"the tiny family could not be prepared in {folder}")


if __name__ == "__main__":
    main()
