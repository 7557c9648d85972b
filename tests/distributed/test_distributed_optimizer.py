"""Megatron-Core's distributed optimizer: what the 12B run saves, rehearsed without a GPU by a stand-in for fused Adam.

On the CPU its own torch AdamW cannot be resumed (upstream), so the config refuses it there; a fused Adam, which counts
its steps per group, is what it meets on a GPU.
"""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import distrib_optimizer

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.read import read_metadata
from tests.distributed.harness import run_distributed
from tests.distributed.training import elastic_values, rows, train


class GroupAdam(torch.optim.Optimizer):
    """AdamW with the interface of the fused ones: moments in fp32, one step count for a group."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode, capturable=False):
        assert adam_w_mode and not capturable
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(moment, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))


def train_fused(values):
    """Train as on a machine whose Adam is fused."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(megatron, "USING_PYTORCH_OPTIMIZER", False))
        patches.enter_context(mock.patch.object(megatron, "Adam", GroupAdam, create=True))
        patches.enter_context(mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True))
        patches.enter_context(mock.patch.object(distrib_optimizer, "USING_APEX_OPTIMIZER", True))
        train(values)


def sharded(start, version, precision, **more):
    trainer = dict(precision=precision, checkpoint_every_n_steps=3, **more.pop("trainer", {}))
    return elastic_values(start, version, optim=dict(use_distributed_optimizer=True), trainer=trainer, **more)


def test_in_bf16_it_goes_on_to_the_last_digit(start):
    """A_log and D stay in fp32, in one group with parameters in bf16."""
    run_distributed(train_fused, 2, sharded(start, "sharded_whole", "bf16"))
    expected = rows(start, "sharded_whole")
    run_distributed(train_fused, 2, sharded(start, "sharded", "bf16", trainer=dict(max_steps=4)))
    run_distributed(train_fused, 2, sharded(start, "sharded", "bf16"))
    assert rows(start, "sharded") == expected | {4: rows(start, "sharded")[4]}
    # Every weight has a whole tensor of each kind, whatever the rank it was on.
    metadata = read_metadata(list_checkpoints(start / "run" / "sharded")[-1]).state_dict_metadata
    weights = {key for key in metadata if key.startswith(("decoder.", "embedding.", "output_layer."))}
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        held = {
            key.removeprefix(f"optimizer.state.{kind}."): metadata[key].size for key in metadata if f"e.{kind}." in key
        }
        assert held.keys() == weights and all(metadata[key].size == size for key, size in held.items())


def test_it_is_gone_on_with_at_every_layout(start):
    run_distributed(train_fused, 2, sharded(start, "straight", "fp32"))
    first = dict(parallel=dict(tensor=2), trainer=dict(max_steps=3))
    run_distributed(train_fused, 4, sharded(start, "resharded", "fp32", **first))
    second = dict(parallel=dict(pipeline=2), trainer=dict(max_steps=6))
    run_distributed(train_fused, 2, sharded(start, "resharded", "fp32", **second))
    run_distributed(train_fused, 2, sharded(start, "resharded", "fp32"))
    found, expected = rows(start, "resharded"), rows(start, "straight")
    for step in range(1, 10):
        for name in ("train/full/kl", "train/half/kl", "grad_norm"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=1e-5, abs=1e-5), step
