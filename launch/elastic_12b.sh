#!/usr/bin/env bash
# The main job: 12B, 9B and 6B in one run, conf/elastic_12b.yaml, on H100 nodes of 8.
#   sbatch launch/elastic_12b.sh data.path=FOLDER init_from.permuted_parent=RUN [key=value ...]
#   sbatch --nodes=16 --time=12:00:00 launch/elastic_12b.sh ...      any option of sbatch, before the launcher
#   DRY_RUN=1 launch/elastic_12b.sh ...                              the srun line and the resolved config
# What else can be set stands on top of launch/common.sh. Five minutes before the time limit the run writes a
# checkpoint and goes back into the queue; it ends when its curriculum does.
#SBATCH --job-name=elastic_12b
#SBATCH --nodes=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -euo pipefail

# Slurm runs a copy of this file; the clone is where the job was submitted from, or where scontrol says it lies.
for LAUNCHER in "${BASH_SOURCE[0]}" "${SLURM_SUBMIT_DIR:-.}/launch/elastic_12b.sh" \
  "$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n "s/^ *Command=\([^ ]*\).*/\1/p")"; do
  REPO=$(dirname "$(dirname "$(readlink -f "$LAUNCHER")")")
  if [ -r "$REPO/launch/common.sh" ]; then break; fi
done
# shellcheck source=launch/common.sh
source "$REPO/launch/common.sh"

launch train_elastic --config-name=elastic_12b "$@"
