#!/usr/bin/env bash
# The smoke chain on one node, data to exports, torchrun inside: recipes/smoke.py.
#   sbatch launch/smoke.sh [train_elastic:trainer.max_steps=20 ...]        under Slurm
#   launch/smoke.sh                                                        on this machine
# An override names its verb first. On GPUs add VERB:trainer=gpu. Stopped half-way, the same line goes on.
# What else can be set stands on top of launch/common.sh.
#SBATCH --job-name=elastic_smoke
#SBATCH --nodes=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-gpu=8
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# Slurm runs a copy of this file; the clone is where the job was submitted from, or where scontrol says it lies.
for LAUNCHER in "${BASH_SOURCE[0]}" "${SLURM_SUBMIT_DIR:-.}/launch/smoke.sh" \
  "$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n "s/^ *Command=\([^ ]*\).*/\1/p")"; do
  REPO=$(dirname "$(dirname "$(readlink -f "$LAUNCHER")")")
  if [ -r "$REPO/launch/common.sh" ]; then break; fi
done
# shellcheck source=launch/common.sh
source "$REPO/launch/common.sh"

launch smoke "$@"
