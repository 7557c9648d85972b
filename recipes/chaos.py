"""Kill a training run again and again and see that nothing is lost.

    python recipes/chaos.py --kills 50            # starts forked from one process that has made the imports
    python recipes/chaos.py --kills 50 --fresh    # every start a `python -m torch.distributed.run` of its own

Hardware: two CPU cores. Time: MEASURED. Expected: every round ends with `equal`, exit code 0.

A tiny family is trained by two processes under torchrun's agent, once without interruption and then in rounds: SIGKILL
hits one worker, both, the agent, or everything, while they start, between steps, or inside a save; the same command is
run again until the run is finished, then the next round begins, until the wanted kills have been counted. At the end of
each round its files are compared with those of the uninterrupted run: every logged number, and every byte of the last
checkpoint's weights, optimizer state and router. No process of a killed attempt may be left.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes._chaos_attempts import MOMENTS, VICTIMS, Attempts, ChaosError, ForkedAgent, FreshAgent, Kill
from recipes._tiny_family import prepare_tiny_family, tiny_family_values

WALL_CLOCK = ("tokens_per_s",)


def logged(folder: Path) -> dict[int, dict[str, object]]:
    """Return the numbers of a run by step; raises ChaosError where a step was logged twice with other numbers."""
    found: dict[int, dict[str, object]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if name not in WALL_CLOCK}
        known = found.setdefault(row["step"], {})
        moved = [name for name in row.keys() & known.keys() if row[name] != known[name]]
        if moved:
            raise ChaosError(f"{folder}: step {row['step']} ran twice with other numbers: {', '.join(sorted(moved))}")
        known.update(row)
    return found


def final_bytes(folder: Path) -> dict[str, bytes]:
    """Return the tensor files of the last checkpoint of a run by name: weights, optimizer state, router."""
    last = max((folder / "checkpoints").glob("step_????????"))
    files = [*last.glob("*.distcp"), *last.glob("router.safetensors")]
    return {f"{last.name}/{path.name}": path.read_bytes() for path in files}


def differing(run: Path, reference: Path) -> list[str]:
    """List the steps and files in which a run is not the reference, bit for bit."""
    rows, expected = logged(run), logged(reference)
    steps = [f"step {step}" for step in sorted(rows.keys() | expected.keys()) if rows.get(step) != expected.get(step)]
    files, wanted = final_bytes(run), final_bytes(reference)
    return steps + [name for name in sorted(files.keys() | wanted.keys()) if files.get(name) != wanted.get(name)]


def chaos(
    folder: Path, kills: int, seed: int, fresh: bool, console: Console
) -> tuple[list[Kill], dict[str, list[str]]]:
    """Run rounds until `kills` attempts were killed; returns the kills and, by round, what differs."""
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


def kill_table(kills: Sequence[Kill], seconds: float) -> Table:
    """Render how many kills hit whom and when."""
    table = Table(title=f"{len(kills)} kills in {seconds:.0f} s")
    for heading in ("waited for", *VICTIMS, "inside a save"):
        table.add_column(heading, justify="left" if heading == "waited for" else "right")
    for moment in dict.fromkeys(MOMENTS):
        hits: Mapping[str, int] = Counter(kill.victim for kill in kills if kill.moment == moment)
        inside = sum(kill.in_save for kill in kills if kill.moment == moment)
        table.add_row(moment, *(str(hits.get(victim, 0)) for victim in VICTIMS), str(inside))
    return table


def main() -> None:
    """Parse the command line, prepare, kill, compare; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many attempts to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=1, help="decides moments and victims (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="start every attempt with a command of its own")
    parser.add_argument("--folder", type=Path, help="a new folder to work in and keep (default: a temporary one)")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
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

    process = multiprocessing.get_context("fork").Process(target=prepare_tiny_family, args=(folder,))
    process.start()
    process.join()
    if process.exitcode:
        raise ChaosError(f"the tiny family could not be prepared in {folder}")


if __name__ == "__main__":
    main()
