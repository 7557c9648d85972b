"""The whole chain on a laptop: `make smoke`, two CPU cores, about 12 minutes, no data downloaded.

Prepares the Python standard library's sources as a corpus, trains a small parent, scores and permutes it, trains one
nested family with three budgets, evaluates it, cuts all three out as Hugging Face folders, and leaves in runs/smoke:
summary.json, family.png and every intermediate folder. Stopped half-way, the same command goes on where it stopped;
`--name` starts another in a folder of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

from recipes._quiet import held_back_output

ROOT = Path(__file__).resolve().parent.parent
VOCAB_TOKENS = 2048
# Libraries announce missing GPU kernels and deprecations in every process of the chain.
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Smoke:
    """Runs the verbs one after another as a user would, each in its own process."""

    def __init__(self, folder: Path, processes: int, overrides: Sequence[str], console: Console) -> None:
        self.folder, self.processes, self.overrides, self.console = folder, processes, overrides, console

    def run(
        self,
        verb: str,
        version: str,
        arguments: Sequence[str] = (),
        *,
        distributed: bool = False,
        threads: int = 1,
        log: Path | None = None,
    ) -> Path:
        """Run one verb unless its folder says that it finished; returns the folder. What it says goes to `log`."""
        target = self.folder / version
        done = self.folder / f".{version}.done"
        if done.exists():
            self.console.print(f"{verb} {version}: already done, kept")
            return target
        self.console.print(Rule(f"{verb} -> {target}"))
        ranks = [f"--nproc-per-node={self.processes}"] if distributed and self.processes > 1 else []
        started = time.perf_counter()
        code, used = self.start(verb, [*ranks, *arguments, *self._shared(verb)], threads, log)
        if code:
            raise SystemExit(f"{verb} failed with code {code}; mend the cause and run the same command")
        done.write_text(f"{time.perf_counter() - started:.1f} {used:.1f}\n")
        return target

    def start(self, verb: str, arguments: Sequence[str], threads: int, log: Path | None) -> tuple[int, float]:
        """Run one verb; returns its exit code and the seconds that cores worked for it and what it started."""
        command = [sys.executable, str(ROOT / "recipes" / f"{verb}.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        with nullcontext() if log is None else log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, used.ru_utime + used.ru_stime

    def into(self, version: str) -> list[str]:
        """Return the overrides that send a verb's output to its folder."""
        return [
            f"exp_manager.exp_dir={self.folder.parent}",
            f"exp_manager.name={self.folder.name}",
            f"exp_manager.version={version}",
        ]

    def seconds(self, *, of_cores: bool = False) -> dict[str, float]:
        """Return how long every finished verb took, whole process: by the clock, or what cores worked for it."""
        times = {path.name[1:-5]: path.read_text().split() for path in sorted(self.folder.glob(".*.done"))}
        return {version: float(time[of_cores]) for version, time in times.items()}

    def _shared(self, verb: str) -> list[str]:
        prefix = f"{verb}:"
        return [override.removeprefix(prefix) for override in self.overrides if override.startswith(prefix)]


def chain(smoke: Smoke) -> dict[str, Any]:
    """Run every verb and return the summary."""
    data = smoke.run(
        "prepare_data", "data", [f"output_dir={smoke.folder / 'data'}", f"vocab_size={VOCAB_TOKENS}"], threads=2
    )
    from_data = f"data.path={data}"
    parent = smoke.run("pretrain_parent", "parent", [from_data, *smoke.into("parent")], distributed=True)
    permuted = smoke.run(
        "estimate_importance",
        "permuted",
        [from_data, f"init_from.parent={parent}", "importance.method=activations", *smoke.into("permuted")],
        threads=smoke.processes,
    )
    family = smoke.run(
        "train_elastic",
        "family",
        ["--config-name=smoke_elastic", from_data, f"init_from.permuted_parent={permuted}", *smoke.into("family")],
        distributed=True,
    )
    from_family = f"init_from.checkpoint={family}"
    exports = smoke.run("extract", "exports", [from_family, "export.megatron=true", *smoke.into("exports")])

    def evaluate(version: str, checkpoint: Path, *more: str) -> list[dict[str, Any]]:
        arguments = [from_data, f"init_from.checkpoint={checkpoint}", *more]
        folder = smoke.run("evaluate", version, [*arguments, *smoke.into(version)])
        return json.loads((folder / "evaluation.json").read_text())["members"]

    extraction = json.loads((exports / "extraction.json").read_text())["members"]
    # Independent of each other: as many at a time as there are processes.
    with ThreadPoolExecutor(smoke.processes) as pool:
        subnets = pool.submit(evaluate, "evaluation_family", family)
        untrained = pool.submit(evaluate, "evaluation_untrained", permuted, f"init_from.router={family}")
        parent_rows = pool.submit(evaluate, "evaluation_parent", parent)
        submodels = {
            row["name"]: pool.submit(evaluate, f"evaluation_submodel_{row['name']}", Path(row["megatron"]))
            for row in extraction
        }
    with held_back_output():
        from recipes._smoke_report import build_summary

    return build_summary(
        parent_rows.result()[0],
        subnets.result(),
        untrained.result(),
        extraction,
        {name: rows.result()[0] for name, rows in submodels.items()},
        data=data,
        parent_dir=parent,
        seconds=smoke.seconds(),
    )


def parse_command_line(purpose: str, name: str) -> Smoke:
    """Read the command line of a chain that stays in the folder `name` by default, and make that folder."""
    os.environ.update(QUIET)  # the report itself loads the exported folders
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--exp-dir", type=Path, default=Path("runs"), help="where runs are written (default: runs)")
    parser.add_argument("--name", default=name, help=f"folder name of this run (default: {name})")
    parser.add_argument("--processes", type=int, default=2, help="processes under torchrun (default: 2)")
    parser.add_argument("overrides", nargs="*", help="verb:key=value, for example train_elastic:trainer.max_steps=20")
    arguments = parser.parse_args()
    folder = arguments.exp_dir / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    return Smoke(folder, arguments.processes, arguments.overrides, Console())


def main() -> None:
    """Parse the command line, run the chain, report."""
    smoke = parse_command_line(__doc__.splitlines()[0], "smoke")
    summary, folder, console = chain(smoke), smoke.folder, smoke.console
    from recipes._smoke_report import draw_family, summary_table

    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw_family(summary, folder / "family.png")
    console.print(summary_table(summary))
    console.print(f"summary: {folder / 'summary.json'}   picture: {folder / 'family.png'}")


if __name__ == "__main__":
    main()
