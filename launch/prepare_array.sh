#!/usr/bin/env bash
# Prepare data on many nodes: an array of jobs, each a shard of the corpus, together one prepared folder (docs/own_model.md).
#   launch/prepare_array.sh SHARDS paths=[FOLDER] tokenizer_path=FOLDER output_dir=FOLDER [key=value ...]
#   OPTIONS="--partition=cpu --time=2:00:00" launch/prepare_array.sh ...       any options of sbatch
# A job takes a node, all its cores, and no GPU. The same command again makes the shards that are missing and leaves the
# others alone. PY=FILE is the Python (default: .venv of this clone, else python3).
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out

set -euo pipefail

if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  REPO=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
  if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 SHARDS key=value ...; the first argument is the number of shards" >&2
    exit 2
  fi
  read -ra WORDS <<<"${OPTIONS:-}"
  export REPO # Slurm runs a copy of this file, which does not know where the clone is
  exec sbatch --array="1-$1" ${WORDS[@]+"${WORDS[@]}"} "$REPO/launch/prepare_array.sh" "$@"
fi

if [ -z "${PY:-}" ]; then
  PY=python3
  if [ -x "$REPO/.venv/bin/python" ]; then PY=$REPO/.venv/bin/python; fi
fi
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# The batch step has all cores of the job; a task of srun might be given one.
exec "$PY" "$REPO/recipes/prepare_data.py" "${@:2}" shard="$SLURM_ARRAY_TASK_ID/$1"
