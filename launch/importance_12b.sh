#!/usr/bin/env bash
# Importance of the 12B parent on one node of 8 H100, and the permuted parent: conf/importance_12b.yaml.
#   sbatch launch/importance_12b.sh data.path=FOLDER init_from.parent=RUN [key=value ...]
# What else can be set stands on top of launch/common.sh. It cannot go on half-way, so it is not requeued.
#SBATCH --job-name=importance_12b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --no-requeue
#SBATCH --output=slurm-%j.out

set -euo pipefail

# Slurm runs a copy of this file; the clone is where the job was submitted from, or where scontrol says it lies.
for LAUNCHER in "${BASH_SOURCE[0]}" "${SLURM_SUBMIT_DIR:-.}/launch/importance_12b.sh" \
  "$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n "s/^ *Command=\([^ ]*\).*/\1/p")"; do
  REPO=$(dirname "$(dirname "$(readlink -f "$LAUNCHER")")")
  if [ -r "$REPO/launch/common.sh" ]; then break; fi
done
# shellcheck source=launch/common.sh
source "$REPO/launch/common.sh"

launch estimate_importance --config-name=importance_12b "$@"
