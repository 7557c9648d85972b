# shellcheck shell=bash
# What the launchers share. A launcher sources this and calls `launch VERB --config-name=RUN "$@"`.
#
# Under Slurm: preflight on every node, an all-reduce over all ranks, then the verb, each as one srun. Elsewhere the
# same three by torchrun on this node. `--config-name=RUN`, with `--config-dir=FOLDER` for one of your own, takes another
# run than the launcher's. Set before the command, if the default does not fit:
#
#   PY=FILE               Python of the run (default: .venv of this clone, else python3; in a container: python)
#   GPUS_PER_NODE=N       default: what Slurm gave the job, else 8; 0 runs on CPUs over gloo
#   PROCESSES_PER_NODE=N  default: one for each GPU
#   MAX_REQUEUES=N        how many times a job that was stopped by a signal goes back into the queue (default 20)
#   PHASE=NAME            end the run after this phase of the curriculum (launch/chain.sh sets it)
#   CONTAINER_IMAGE=REF   run inside this image, by enroot and pyxis
#   CONTAINER_MOUNTS=A:B  mounts beside those of the clone, the working directory and every path in an override
#   MASTER_ADDR, MASTER_PORT  where the ranks meet (default: the first node, a port from the job's number)
#   NNODES, NODE_RANK     without Slurm: how many nodes, and which one this is (default 1 and 0)
#   DRY_RUN=1             print the command and the resolved config, start nothing

COLLECTIVE_CHECK_S=300 # the first contact of 512 GPUs can take minutes
EXIT_PREFLIGHT=2 EXIT_BUDGET=75

say() { printf 'launch: %s\n' "$*"; }

header() { # the value of one #SBATCH option of the launcher: what sbatch would have asked for
  sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$LAUNCHER"
}

find_place() { # which nodes, which ranks, where they meet, where the logs go
  IN_SLURM=
  if [ -n "${SLURM_JOB_ID:-}" ]; then IN_SLURM=1; fi
  JOB=${SLURM_JOB_ID:-local_$(date +%Y%m%d_%H%M%S)} TRY=${SLURM_RESTART_COUNT:-0}
  if [ -n "$IN_SLURM" ]; then
    NODES=$SLURM_JOB_NUM_NODES
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
    # Below the range from which systems take ports for outgoing connections (32768), one for each job.
    MASTER_PORT=${MASTER_PORT:-$((12000 + SLURM_JOB_ID % 18000))}
  else
    NODES=${NNODES:-1}
    if [ -n "${DRY_RUN:-}" ]; then NODES=${NNODES:-$(header nodes)}; fi
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29400}
  fi
  GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(header gpus-per-node)}}
  PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-$GPUS_PER_NODE}
  LOGS=$PWD/logs/$JOB/try_$TRY
  export ELASTIC_STOP_FILE=$LOGS/stop # rank 0 looks for it after every step
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    PY=${PY:-python}
  elif [ -z "${PY:-}" ]; then
    PY=python3
    if [ -x "$REPO/.venv/bin/python" ]; then PY=$REPO/.venv/bin/python; fi
  fi
}

container_options() { # arguments: the overrides; every existing path in them, in lists too, is mounted where it is
  CONTAINER=()
  if [ -z "${CONTAINER_IMAGE:-}" ]; then return; fi
  local mounts=$REPO:$REPO argument path words
  if [ "$PWD" != "$REPO" ]; then mounts+=,$PWD:$PWD; fi
  for argument in "$@"; do
    argument=${argument#*=}
    IFS=$' \t\n[]{},:="\'' read -r -d '' -a words <<<"$argument" || true # '[{path: /corpora/web, weight: 1}]'
    for path in "$argument" ${words[@]+"${words[@]}"}; do
      if [[ $path == ../* ]]; then path=$(realpath -s "$path"); fi # for example --config-dir=../mine
      if [[ ! -e $path && -e $path.idx ]]; then path=${path%/*}; fi # what another tool wrote: PATH.bin and PATH.idx
      if [[ $path == /?* && -e $path && ,$mounts, != *",$path:$path,"* ]]; then mounts+=,$path:$path; fi
    done
  done
  mounts+=${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
}

step() { # arguments: log name, then a command; fills STEP with the srun that runs it once on each node
  # When one node ends, with an error or without, the others do not outlive it for long; but all have a say in preflight.
  local together=(--kill-on-bad-exit=1 --wait=60)
  if [ "$1" = preflight ]; then together=(--kill-on-bad-exit=0 --wait=300); fi
  # A task is a whole node's torchrun: bound to its "one CPU", its eight ranks would share a core.
  STEP=(srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --cpu-bind=none "${together[@]}"
    --output="$LOGS/$1_%n.log" ${CONTAINER[@]+"${CONTAINER[@]}"} "${@:2}")
}

torchrun() { # arguments: what each rank runs; fills TORCHRUN with one node's share, to be run by bash -c
  # torchrun itself would die of USR1; the ranks set their own handler for it. Ranks follow the order of the nodes.
  # shellcheck disable=SC2016
  TORCHRUN=(bash -c 'trap "" USR1; exec "$0" -m torch.distributed.run --node-rank="${SLURM_NODEID:-${NODE_RANK:-0}}" "$@"'
    "$PY" --nnodes="$NODES" --nproc-per-node="$PROCESSES_PER_NODE" --master-addr="$MASTER_ADDR"
    --master-port="$MASTER_PORT" "$@")
}

run() { # arguments: log name, then a command; under srun or as it is; returns its code
  local code=0 told
  if [ -n "$IN_SLURM" ]; then
    step "$@"
    "${STEP[@]}" &
  else
    # tee becomes a child of the command, beside the ranks, and would die of the signal meant for them.
    "${@:2}" > >(trap '' USR1 && exec tee "$LOGS/$1_${NODE_RANK:-0}.log") 2>&1 &
  fi
  CHILD=$!
  while :; do
    told=$TOLD code=0
    wait "$CHILD" || code=$?
    if [ "$told" = "$TOLD" ]; then break; fi # otherwise it was the trap that ended the wait
  done
  return "$code"
}

on_usr1() { # the time is nearly over; a second USR1 would end the ranks at once and is not passed on
  TOLD=$((TOLD + 1))
  if [ "$TOLD" -gt 1 ] || [ -z "$IS_TRAINING" ]; then return; fi
  say "USR1: a checkpoint after the running step"
  : >"$ELASTIC_STOP_FILE" # for ranks that do not hear it: those that load, and all of them under proctrack/cgroup
  if [ -n "$IN_SLURM" ]; then
    kill -USR1 "$CHILD" # srun hands it on to its tasks; under proctrack/linuxproc to every process of theirs
  else
    pkill -USR1 -P "$CHILD" # the ranks under this node's torchrun
  fi
}

command_of() { # arguments: verb and its overrides; fills COMMAND with what one node runs
  if [ "$1" = smoke ]; then # it calls torchrun itself, verb after verb
    COMMAND=("$PY" "$REPO/recipes/smoke.py" "${@:2}")
  else
    torchrun "$REPO/recipes/$1.py" "${@:2}"
    COMMAND=("${TORCHRUN[@]}")
  fi
}

preflight() { # arguments: verb and its overrides; ends the job with every problem of every node, or leaves the plan
  local code=0
  run preflight "$PY" "$REPO/recipes/preflight.py" --gpus="$GPUS_PER_NODE" --port="$MASTER_PORT" --plan="$LOGS/plan" \
    --processes="$((NODES * PROCESSES_PER_NODE))" ${PHASE:+--phase="$PHASE"} "$@" || report preflight
  if [ "$1" = smoke ] || [ "$(planned finished)" = yes ]; then return; fi
  torchrun -m elastic.preflight.collective --folder="$(planned run_dir)"
  run collective timeout --kill-after=10 "$COLLECTIVE_CHECK_S" "${TORCHRUN[@]}" || code=$?
  if [ "$code" -ne 0 ]; then report collective; fi
}

planned() { # argument: a name; prints its value in the plan that preflight left (smoke has none)
  sed -n "s/^$1=//p" "$LOGS/plan_${NODE_RANK:-0}" 2>/dev/null || true
}

report() { # argument: log name; prints each problem once with the nodes that have it, and ends the job
  say "preflight failed, nothing was started (logs: $LOGS/$1_*.log)"
  awk -v nodes="$NODES" -f "$REPO/launch/problems.awk" "$LOGS/$1"_*.log 2>/dev/null ||
    say "no log was written: srun could not start on the nodes, or could not write to $LOGS there"
  exit "$EXIT_PREFLIGHT"
}

blame() { # prints what each node's log says of its first failure, the likeliest cause first
  say "failed; what the nodes' logs say, the likeliest culprit first:"
  awk -f "$REPO/launch/failures.awk" "$LOGS"/node_*.log | sort | cut -f 2-
  say "logs: $LOGS"
}

is_finished() { # whether the run's own flag says that it reached the planned number of steps
  local flag step
  flag="$(planned run_dir)/finished.json"
  if [ ! -r "$flag" ]; then return 1; fi
  step=$(sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$flag")
  [ "${step:-0}" -ge "$(planned total_steps)" ]
}

go_on_later() { # back into the queue, as often as MAX_REQUEUES allows; the run resumes from its checkpoint
  if [ -n "$IN_SLURM" ] && [ "$TRY" -lt "$MAX_REQUEUES" ]; then
    say "requeue $((TRY + 1)) of at most $MAX_REQUEUES"
    local attempt
    for attempt in 1 2 3 4 5; do # a busy controller may not answer the first time
      if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
      sleep "$((attempt * 3))"
    done
    say "Slurm did not take the job back"
  fi
  say "stopped before the end (requeues used: $TRY of $MAX_REQUEUES); the same command goes on"
  exit "$EXIT_BUDGET"
}

dry_run() { # arguments: verb and its overrides
  command_of "$@"
  step node "${COMMAND[@]}"
  say "would run, after preflight and an all-reduce over all ranks:"
  printf '%q ' "${STEP[@]}"
  printf '\n'
  if [ "$1" = smoke ]; then return; fi
  if ! command -v "$PY" >/dev/null; then
    say "the config is not shown: $PY is in the image only"
    return
  fi
  say "with the config:"
  "$PY" "$REPO/recipes/preflight.py" --show ${PHASE:+--phase="$PHASE"} --gpus="$GPUS_PER_NODE" \
    --processes="$((NODES * PROCESSES_PER_NODE))" "$@"
}

launch() { # arguments: verb, --config-name=..., overrides
  MAX_REQUEUES=${MAX_REQUEUES:-20} TOLD=0 IS_TRAINING=
  find_place
  # shellcheck source=launch/env.sh
  source "$REPO/launch/env.sh"
  container_options "${@:2}"
  if [ -n "${DRY_RUN:-}" ]; then
    dry_run "$@"
    return
  fi
  if [ "$TRY" -gt "$MAX_REQUEUES" ]; then go_on_later; fi # Slurm itself requeues after the loss of a node
  mkdir -p "$LOGS"
  trap on_usr1 USR1
  if [ -z "$IN_SLURM" ]; then trap 'kill -TERM "$CHILD"' TERM; fi # clouds announce the end so; torchrun hands it on
  say "job $JOB, try $TRY: $NODES nodes x $PROCESSES_PER_NODE processes, $MASTER_ADDR:$MASTER_PORT; logs: $LOGS"
  preflight "$@"
  if [ "$(planned finished)" = yes ]; then
    say "$(planned run_dir) is finished already; nothing to do"
    return
  fi
  if [ "$TOLD" -gt 0 ]; then go_on_later; fi
  local more code=0
  more=$(planned override)
  command_of "$@" ${more:+"$more"}
  IS_TRAINING=1
  run node "${COMMAND[@]}" || code=$?
  if [ "$code" -ne 0 ]; then
    blame
    exit "$code"
  fi
  if [ "$TOLD" -gt 0 ] && ! is_finished; then go_on_later; fi
  say "done"
}
