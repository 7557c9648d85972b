"""The optimizer's state as parts of global tensors, for checkpoints that any layout reads.

Megatron-Core's own `sharded_state_dict` does this but for two cases: bf16 and fp32 parameters in one group (A_log and D
stay in fp32; their indices among the bf16 ones are miscounted), and an optimizer that has not taken a step yet.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from megatron.core.dist_checkpointing import optimizer as dist_optimizer
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch.nn import Parameter

# Megatron-Core's names: the one step count of all parameters, and the fp32 copies of bf16 weights.
STEP, MAIN = "common_step", "fp32_from_fp16_params"


def sharded_optimizer_state(
    optimizer: ChainedOptimizer, sharded_model: Mapping[str, Any], is_loading: bool, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe the state of this rank by name, index and global size; `sharded_model` is the model's sharded state.

    Keys and values are those of Megatron-Core's own `sharded_state_dict`, so `load_state_dict` takes them.
    """
    for part in optimizer.chained_optimizers:
        if not (is_loading and isinstance(part, DistributedOptimizer)):  # which makes room for what is loaded itself
            begin_state(part)
    match optimizer.chained_optimizers:
        case [Float16OptimizerWithFloat16Params() as half]:
            return _sharded_half_precision(half, sharded_model)
    # The one format of the distributed optimizer that fits every tensor-, pipeline- and data-parallel size. A save
    # gathers it over gloo on the first replica alone: over NCCL every rank would take two fp32 buckets of its GPU (the
    # whole of a later pipeline stage: 23 GB of the 12B at TP2 PP2), and all of them the state in their nodes' memory.
    metadata = {**metadata, "distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    metadata["distrib_optim_fully_reshardable_mem_efficient"] = True
    state: dict[str, Any] = optimizer.sharded_state_dict(sharded_model, is_loading=is_loading, metadata=metadata)
    match optimizer.chained_optimizers:
        case [FP32Optimizer() as part] if _counts_each_step(part):
            state["state"][STEP] = state["state"].get(STEP, torch.tensor(0.0)).cpu()  # 0 is left out
    return state


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Give parameters that have taken no step yet the state that Adam begins with anyway: zeros."""
    if optimizer.is_stub_optimizer:
        return
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if _counts_each_step(optimizer):
        for parameter, state in optimizer.optimizer.state.items():
            # On the parameter's device, where the fused kernel that a GPU takes (train/optimizer.py) wants it.
            state["step"] = state.get("step", torch.tensor(0.0)).to(parameter.device)


def _counts_each_step(optimizer: MegatronOptimizer) -> bool:
    """Tell torch's Adam, which has a step for each parameter, from fused ones, which have one for a group."""
    return isinstance(optimizer.optimizer, torch.optim.Adam)


def count_in_order(optimizer: ChainedOptimizer) -> None:
    """Let a distributed optimizer find the state of each parameter; to be called once, when it has been built.

    It notes indices in the order of its buffers, and then puts fp32 parameters before those in half precision.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
            for group, kinds in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
                for index, parameter in enumerate(chain.from_iterable(kinds)):
                    part.model_param_group_index_map[parameter] = (group, index)


def _sharded_half_precision(
    optimizer: Float16OptimizerWithFloat16Params, sharded_model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what Megatron-Core would, with fp32 parameters counted where they stand among the bf16 ones."""
    state: dict[str, Any] = optimizer.state_dict()
    is_half, parameters = zip(*_model_parameters(optimizer), strict=True)
    by_id = dist_optimizer.get_param_id_to_sharded_param_map(sharded_model, parameters)
    state[MAIN] = [
        [
            dist_optimizer.make_sharded_optimizer_tensor(by_id[number], main, prefix="optimizer.state.fp32_param")
            for number, main in zip((n for n in group["params"] if is_half[n]), mains, strict=True)
        ]
        for group, mains in zip(state["optimizer"]["param_groups"], state[MAIN], strict=True)
    ]
    steps = [own["step"] for own in state["optimizer"]["state"].values() if "step" in own]
    assert all(step == steps[0] for step in steps), "one step count is stored for all parameters"
    dist_optimizer.optim_state_to_sharding_state(state["optimizer"], by_id, exclude_keys="step")
    if steps:
        # On the CPU: a value beside the tensors is read back where it was, by every rank on the first one's GPU.
        state["optimizer"]["state"][STEP] = steps[0].cpu()
    return state


def _model_parameters(optimizer: Float16OptimizerWithFloat16Params) -> Iterator[tuple[bool, Parameter]]:
    """Yield (is it in half precision, the model's parameter) in the order in which torch's optimizer counts them."""
    groups = optimizer.optimizer.param_groups
    for group, halves, wholes in zip(groups, optimizer.float16_groups, optimizer.fp32_from_fp32_groups, strict=True):
        in_half, in_fp32 = iter(halves), {id(parameter) for parameter in wholes}
        for parameter in group["params"]:  # an fp32 parameter of the model itself, or the fp32 copy of the next in bf16
            yield (False, parameter) if id(parameter) in in_fp32 else (True, next(in_half))
