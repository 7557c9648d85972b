#!/usr/bin/env bash
# Loss, perplexity and cost of every budget of the 12B family on one node of 8 H100: conf/evaluate_12b.yaml.
#   sbatch launch/evaluate.sh data.path=FOLDER init_from.checkpoint=RUN [key=value ...]
# What else can be set stands on top of launch/common.sh. It is short and starts over, so it is not requeued.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --no-requeue
#SBATCH --output=slurm-%j.out

set -euo pipefail

# Slurm runs a copy of this file; the clone is where the job was submitted from, or where scontrol says it lies.
for LAUNCHER in "${BASH_SOURCE[0]}" "${SLURM_SUBMIT_DIR:-.}/launch/evaluate.sh" \
  "$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n "s/^ *Command=\([^ ]*\).*/\1/p")"; do
  REPO=$(dirname "$(dirname "$(readlink -f "$LAUNCHER")")")
  if [ -r "$REPO/launch/common.sh" ]; then break; fi
done
# shellcheck source=launch/common.sh
source "$REPO/launch/common.sh"

launch evaluate --config-name=evaluate_12b "$@"
