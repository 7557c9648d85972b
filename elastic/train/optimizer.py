"""Optimizers, Megatron-Core's Adam for the model and torch's AdamW for the router, and the gradients they step on."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import AdamW, Optimizer

from elastic.checkpoint.optimizer_state import count_in_order
from elastic.config.sections import OptimConfig
from elastic.model.model import ElasticModel
from elastic.space.axes import STREAM_AXES, Axis
from elastic.world.groups import World


def wrap_for_training(model: ElasticModel, optim: OptimConfig) -> DistributedDataParallel:
    """Wrap one stage in Megatron-Core's data-parallel gradient buffers, reduced in at least fp32.

    With `overlap_param_gather` the new weights that other ranks hold are gathered when PipelineRunner says so, and it
    waits for them: Megatron-Core's own hooks stand on calls of modules, which our layers go past.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.config.bf16,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_param_gather=optim.overlap_param_gather,
    )
    wrapped = DistributedDataParallel(model.config, config, model)
    if optim.overlap_param_gather:
        wrapped.disable_forward_pre_hook(param_sync=False)
    return wrapped


def build_optimizer(wrapped: DistributedDataParallel, optim: OptimConfig, world: World) -> ChainedOptimizer:
    """Build the model's optimizer; its Adam is Transformer Engine's, apex's or torch's (model/backends.py)."""
    config = OptimizerConfig(
        lr=0.0,  # set before every step from the phase's schedule; the others by set_hyperparameters
        clip_grad=optim.clip_grad,
        bf16=world.layout.dtype is torch.bfloat16,
        params_dtype=world.layout.dtype,
        use_distributed_optimizer=optim.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    assert isinstance(optimizer, ChainedOptimizer)
    count_in_order(optimizer)
    set_hyperparameters(optimizer, optim)
    wrapped.config.finalize_model_grads_func = finalize_model_grads
    wrapped.config.grad_scale_func = optimizer.scale_loss
    if optim.overlap_grad_reduce:
        wrapped.config.no_sync_func = wrapped.no_sync  # reduce with the last micro-batch only
    return optimizer


@contextmanager
def reduced_at_once(wrapped: DistributedDataParallel) -> Iterator[None]:
    """Reduce all gradients of a step after its last backward pass, whatever the config says of overlapping.

    Replicas whose last micro-batches differ would start the buckets in different orders, and wait for each other.
    """
    config = wrapped.config
    if not wrapped.ddp_config.overlap_grad_reduce:
        yield
        return
    no_sync, finalize = config.no_sync_func, config.finalize_model_grads_func

    def start_and_finalize(*args: Any, **kwargs: Any) -> None:
        wrapped.start_grad_sync()
        finalize(*args, **kwargs)

    config.no_sync_func, config.finalize_model_grads_func = nullcontext, start_and_finalize
    try:
        with wrapped.no_sync():
            yield
    finally:
        config.no_sync_func, config.finalize_model_grads_func = no_sync, finalize


def overlaps(student: nn.Module) -> bool:
    """Tell whether gradients are reduced bucket by bucket beside the backward pass."""
    return isinstance(student, DistributedDataParallel) and student.ddp_config.overlap_grad_reduce


def say_added(parameter: Tensor) -> None:
    """Leave Megatron-Core's hook nothing to add; it insists on a gradient, so zeros that take no memory."""
    parameter.grad = parameter.new_zeros(()).expand_as(parameter)
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # the wrapper's


class AllReady(torch.autograd.Function):
    """Passes a copy on (the schedule frees what a stage hands on, so no view) and has no gradient for the parameters.

    Autograd then calls the wrapper's hooks on them all the same.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for parameter in ctx.parameters:
            say_added(parameter)
        return grad, *(None for _ in ctx.parameters)


def build_router_optimizer(router: nn.Module, optim: OptimConfig) -> Optimizer:
    """Build the router's own AdamW; its weights are replicated on every rank."""
    betas = (optim.adam_beta1, optim.adam_beta2)
    return AdamW(router.parameters(), lr=0.0, betas=betas, eps=optim.eps, weight_decay=optim.router_weight_decay)


def set_hyperparameters(optimizer: MegatronOptimizer, optim: OptimConfig) -> None:
    """Give every parameter group the config's values; a checkpoint brings those of the run that wrote it."""
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (optim.adam_beta1, optim.adam_beta2), optim.eps
        # Norms, biases, A_log, D and dt_bias are not decayed; Megatron-Core leaves this to its own scheduler.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        if "fused" in group and group["params"] and group["params"][0].is_cuda:  # torch's own, where no other is there
            group["fused"] = True


def set_learning_rate(optimizer: Optimizer | MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer, device: torch.device) -> Tensor:
    """Return the norm of all gradients, equal on all ranks of a replica; the first half of the optimizer's step().

    On the device, without a wait: Megatron-Core's own reads the norm of each gradient where no fused kernel is
    installed. A weight that several ranks hold counts once.
    """
    optimizer.prepare_grads()
    gradients = [gradient for part in optimizer.chained_optimizers for gradient in part.get_grads_for_grad_norm()]
    squared = torch.zeros(1, device=device)
    if gradients:
        squared += torch.stack(torch._foreach_norm(gradients)).norm() ** 2
    torch.distributed.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    return squared[0].double().sqrt()


@torch.no_grad()
def apply_gradients(optimizer: ChainedOptimizer, norm: Tensor) -> None:
    """Clip by `norm` and update the weights; the second half of the optimizer's step().

    In two halves so that nothing is touched before it is known that every number is finite: Megatron-Core looks for
    NaN and Inf only where it scales fp16 losses. `tests/distributed/test_nonfinite.py` compares the halves with step().
    """
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients and part.config.clip_grad > 0.0:
            torch._foreach_mul_(gradients, (part.config.clip_grad / (norm + 1e-6)).clamp(max=1.0).float())
    optimizer.step_with_ready_grads()


def sum_gate_gradients(flat: Tensor, entries: Iterable[tuple[Axis, int]], world: World) -> Tensor:
    """Sum `flat` over one replica, equal on all its ranks; `entries` lists (axis, number of values) in flat's order.

    The residual stream is replicated over tensor-parallel ranks (unless sequence parallel splits its tokens), so the
    axes that gate the stream, hidden and depth, count once; inner axes are sharded and are summed. Pipeline stages hold
    different layers and context-parallel ranks different tokens: always summed.
    """
    counted_here = world.layout.sequence or world.groups.tp.rank() == 0
    weights = [
        torch.full((size,), float(counted_here or axis not in STREAM_AXES), device=flat.device)
        for axis, size in entries
    ]
    return world.sum_over_replica(flat * torch.cat(weights))


def sum_router_gradients(parameters: Iterable[nn.Parameter], world: World) -> list[Tensor]:
    """Sum the router's gradients over replicas, in one exchange over all ranks: equal bits everywhere. Returns them."""
    groups = world.groups
    speaks = groups.tp.rank() == 0 and groups.pp.rank() == 0 and groups.cp.rank() == 0
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) * float(speaks)
    torch.distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
    return gradients
