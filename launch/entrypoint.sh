#!/usr/bin/env bash
# Entry point of the image: the first word is a recipe, `selftest`, or any command.
#   docker run IMAGE train_elastic --config-name=smoke_elastic key=value ...
# Recipes that train or score run under torchrun on all GPUs of the container; PROCESSES sets another number of ranks.
set -euo pipefail

HOME_OF_CODE=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
WORD=${1:-selftest}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false} # or it warns in every process that forks
case $WORD in
  selftest)
    exec python3 -m elastic.selftest
    ;;
  train_elastic | pretrain_parent | estimate_importance | evaluate)
    PROCESSES=${PROCESSES:-$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)}
    if [ "$PROCESSES" -eq 0 ]; then export TORCHDYNAMO_DISABLE=1; fi # or Megatron-Core compiles C++ at its first step
    if [ "$PROCESSES" -gt 1 ]; then
      exec python3 -m torch.distributed.run --standalone --nproc-per-node="$PROCESSES" \
        "$HOME_OF_CODE/recipes/$WORD.py" "${@:2}"
    fi
    exec python3 "$HOME_OF_CODE/recipes/$WORD.py" "${@:2}"
    ;;
  *)
    if [ -f "$HOME_OF_CODE/recipes/$WORD.py" ]; then exec python3 "$HOME_OF_CODE/recipes/$WORD.py" "${@:2}"; fi
    exec "$@"
    ;;
esac
