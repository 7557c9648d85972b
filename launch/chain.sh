#!/usr/bin/env bash
# Submit the phases of one run as jobs that wait for each other: each has its own size and time, all write one run.
#   launch/chain.sh key=value ...                                one job for each phase in PHASES
#   PHASES="short_context long_context" OPTIONS="--nodes=64 --nodes=32" launch/chain.sh key=value ...
# PHASES are phase names of the curriculum, in its order; OPTIONS holds one word of sbatch options for each of them.
# IMPORTANCE="key=value ..." scores and permutes the parent first, with these overrides; EVALUATE="key=value ..." ends
# the chain. A job that fails, or uses up its requeues, takes those after it out of the queue.
set -euo pipefail

LAUNCH=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
read -ra PHASE_NAMES <<<"${PHASES:-short_context long_context}"
read -ra PHASE_OPTIONS <<<"${OPTIONS:-}"
read -ra IMPORTANCE_OVERRIDES <<<"${IMPORTANCE:-}"
read -ra EVALUATE_OVERRIDES <<<"${EVALUATE:-}"
PREVIOUS=

submit() { # arguments: sbatch options, launcher, overrides
  local dependency=()
  if [ -n "$PREVIOUS" ]; then dependency=(--dependency="afterok:$PREVIOUS" --kill-on-invalid-dep=yes); fi
  PREVIOUS=$(sbatch --parsable ${dependency[@]+"${dependency[@]}"} "$@")
  PREVIOUS=${PREVIOUS%%;*} # a federation adds the cluster's name
  printf 'chain: job %s: %s\n' "$PREVIOUS" "$*"
}

if [ -n "${IMPORTANCE:-}" ]; then submit "$LAUNCH/importance_12b.sh" "${IMPORTANCE_OVERRIDES[@]}"; fi
for index in "${!PHASE_NAMES[@]}"; do
  export PHASE=${PHASE_NAMES[$index]} # sbatch hands the environment on
  submit ${PHASE_OPTIONS[$index]:+"${PHASE_OPTIONS[$index]}"} "$LAUNCH/elastic_12b.sh" "$@"
done
unset PHASE
if [ -n "${EVALUATE:-}" ]; then submit "$LAUNCH/evaluate.sh" "${EVALUATE_OVERRIDES[@]}"; fi
