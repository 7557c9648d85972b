# shellcheck shell=bash
# Environment of every process of a run, sourced by the launchers. A value that is set already wins. What depends on
# the cluster (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, GLOO_SOCKET_IFNAME, ...) is not set here: export it before sbatch.

# The code that runs is the code of this clone, installed or not, in a container or not.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
# What a killed process printed last is in its log.
export PYTHONUNBUFFERED=1
# A crash in native code (CUDA, NCCL, a kernel) leaves the Python stack it came from in the log.
export PYTHONFAULTHANDLER=1
# One thread a rank: tokens are read from a memory map, and torchrun would set the same with a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Its threads and the processes that save a checkpoint do not go together; it says so in every process otherwise.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# Compute nodes often have no internet: a look at the hub is an error at once and not a hang of minutes.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

if [ "$GPUS_PER_NODE" -gt 0 ]; then
  # One hardware queue, so that a tensor- or context-parallel collective that was launched before the GEMM it overlaps
  # with also starts before it. Needed up to Hopper; set it to something else on Blackwell.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # One line that names the interface, the peer or the version when NCCL fails; nothing while it works.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # A collective that hangs beyond its time-out ends its process, without waiting for a clean-up that hangs as well.
  # PyTorch's default today; the launchers rely on it.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
  # And leaves a record of the last collectives of each rank beside its log: it shows the rank that did not come. (These
  # names are known to older PyTorch in NVIDIA's images and to newer ones.)
  export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
  export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
  export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$LOGS/nccl_trace_rank_}
else
  # Megatron-Core's fused functions otherwise compile C++ at their first call.
  export TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
fi
