"""A launcher at work without a cluster: srun, scontrol, sbatch and Python are stand-ins that write down their calls."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
LAUNCHERS = {
    "elastic_12b": "train_elastic",
    "importance_12b": "estimate_importance",
    "evaluate": "evaluate",
    "smoke": "smoke",
}
SRUN = """#!/usr/bin/env bash
# Runs the command once for each node, one after another.
echo "srun $*" >>{log}
trap '' USR1
for word in "$@"; do
  case $word in
    --nodes=*) nodes=${{word#*=}} ;;
    --output=*) output=${{word#*=}} ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
code=0
for ((node = 0; node < nodes; node++)); do
  SLURM_NODEID=$node "$@" >"${{output/\\%n/$node}}" 2>&1 || code=$?
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>{log}
if [ "$1 $2" = "show hostnames" ]; then printf 'first\\nsecond\\n'; fi
"""
SBATCH = """#!/usr/bin/env bash
echo "sbatch PHASE=${{PHASE:-}} $*" >>{log}
echo "$(wc -l <{log});cluster"
"""
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *preflight.py*) {preflight} ;;
  *preflight.collective*) {collective} ;;
  *) {train} ;;
esac
"""
PLAN = (
    'printf "run_dir={run}\\ntotal_steps=9\\nfinished={finished}\\noverride={override}\\n" >"$LOGS/plan_$SLURM_NODEID"'
)


class Job:
    """A job's shell with stand-ins on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.run_dir = folder, folder / "calls", folder / "run"
        self.plan(finished="no")
        self.collective, self.train = "true", 'echo "trained on node $SLURM_NODEID"'
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
            self.stand_in(name, text.format(log=self.log))
        self.log.touch()
        self.run_dir.mkdir()

    def stand_in(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def plan(self, finished: str, override: str = "") -> None:
        """Let preflight pass and leave this plan."""
        self.preflight = PLAN.format(run=self.run_dir, finished=finished, override=override)

    def start(
        self, launcher: str, *overrides: str, python: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a launcher as Slurm would on its first node; preflight knows where its logs go."""
        commands = dict(preflight=self.preflight, collective=self.collective, train=self.train)
        self.stand_in("python", PYTHON.format(**commands))
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        variables = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PY": python or str(self.folder / "python"),
            "GPUS_PER_NODE": "8",
            "LOGS": str(self.folder / "logs" / "7" / f"try_{environment.get('SLURM_RESTART_COUNT', '0')}"),
            **slurm,
            **environment,
        }
        variables = {name: value for name, value in variables.items() if value != "unset"}
        command = ["bash", str(LAUNCH / f"{launcher}.sh"), *overrides]
        return subprocess.run(
            command, env=variables, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120
        )

    def calls(self, word: str) -> list[str]:
        """List the calls of a stand-in."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(word)]

    def finish(self, step: int) -> None:
        (self.run_dir / "finished.json").write_text(f'{{\n "step": {step},\n "total_steps": 9\n}}\n')
