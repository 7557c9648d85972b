"""Each Triton kernel at the widths of the 12B against its PyTorch twin and its floor in bytes; and the whole loss.

The floor is the time to copy as many bytes as have to be read and written once, at the copy speed of this machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic.distill.chunk import LossSettings, VocabShard, chunk_loss, fused_chunk_loss
from elastic.distill.kl import distillation_loss
from elastic.model.elementwise import TorchElementwise, TritonElementwise
from recipes.benchmarks._clock import Ceilings, Clock, Work

CHUNK_TOKENS = 2048
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Widths:
    """Sizes of the operations: tokens, the 12B's hidden, FFN, Mamba and convolution widths, groups, in_proj's rows."""

    tokens: int = 8192
    hidden: int = 5120
    ffn: int = 20480
    mamba: int = 10240
    conv: int = 12288
    groups: int = 8
    in_proj: int = 22656
    chunk: tuple[int, int] = (2048, 65536)
    losses: tuple[tuple[int, int], ...] = ((2048, 65536), (8192, 131072))


TINY = Widths(4, 32, 40, 64, 48, 2, 120, (3, 50), ((8, 64), (16, 128)))


@dataclass(frozen=True)
class Operation:
    """One operation of the model on `leaves`; its bytes are counted in readings and writings of its output."""

    name: str
    call: Callable[[TorchElementwise], Tensor]
    leaves: tuple[Tensor, ...]
    forward_passes: int
    backward_passes: int


def operations(widths: Widths, device: torch.device) -> list[Operation]:
    """Return the operations between the matrix products, under masks, in bf16."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device).bfloat16().requires_grad_()

    def gate(width: int) -> Tensor:
        return torch.rand(width, device=device).requires_grad_()

    n, hidden, mamba = widths.tokens, widths.hidden, widths.mamba
    x, y, weight, hidden_gate = draw(n, 1, hidden), draw(n, 1, hidden), draw(hidden), gate(hidden)
    active, depth = hidden_gate.sum().detach().requires_grad_(), torch.tensor(0.5, device=device).requires_grad_()
    u, z, group_weight, channel_gate = draw(n, 1, mamba), draw(n, 1, mamba), draw(mamba), gate(mamba)
    neurons, neuron_gate = draw(n, 1, widths.ffn), gate(widths.ffn)
    rows, taps, bias = draw(1, n, widths.in_proj), draw(widths.conv, 4), draw(widths.conv)
    xbc, groups = rows[..., -widths.conv :].detach().requires_grad_(), widths.groups
    return [
        Operation("norm", lambda e: e.norm(x, weight, active, 1e-5), (x, weight, active), 2, 3),
        Operation(
            "gated group norm",
            lambda e: e.norm(u, group_weight, None, 1e-5, groups, z, channel_gate),
            (u, group_weight, z, channel_gate), 3, 5,
        ),
        Operation("squared ReLU", lambda e: e.squared_relu(neurons, neuron_gate), (neurons, neuron_gate), 2, 3),
        Operation("residual", lambda e: e.residual(x, y, depth, hidden_gate), (x, y, depth, hidden_gate), 3, 3),
        Operation("convolution", lambda e: e.causal_conv(xbc, taps, bias), (xbc, taps, bias), 2, 3),
    ]  # fmt: skip


def compared(clock: Clock, ceilings: Ceilings, tiny: bool) -> list[dict[str, Any]]:
    """Measure every kernel and its twin, forward and backward, one row per kernel and pass."""
    rows: list[dict[str, Any]] = []
    widths = TINY if tiny else Widths()
    if not clock.in_time("kernels"):
        return rows
    ours, twin = TritonElementwise(), TorchElementwise()
    for operation in operations(widths, clock.device):
        num_bytes = operation.call(twin).nbytes
        passes = (("forward", operation.forward_passes), ("backward", operation.backward_passes))
        for which, count in passes:
            pair = {name: _pass(operation, which, of) for name, of in (("triton", ours), ("torch", twin))}
            rows += _row(clock, ceilings, f"{operation.name}, {which}", pair, count * num_bytes)
    tokens, vocab = widths.chunk
    student, teacher = (torch.randn(tokens, vocab, device=clock.device) for _ in range(2))
    weights = torch.ones(tokens, device=clock.device)
    labels, shard = torch.zeros(tokens, dtype=torch.int64, device=clock.device), VocabShard(0, vocab, vocab, None)
    settings = LossSettings(1.0, 0.0, TEMPERATURE, True, shard)
    pair = {
        "triton": partial(fused_chunk_loss, student, teacher, labels, weights, settings, torch.bfloat16),
        # The twin uses its input up, which the next turn finds: no matter for its time.
        "torch": partial(chunk_loss, student.clone(), teacher.clone(), labels, weights, settings),
    }
    # Both logits are read twice, for the sums and for the gradient, which is written in bf16.
    return rows + _row(clock, ceilings, f"loss of a chunk [{tokens:,} x {vocab:,}]", pair, (4 * 4 + 2) * tokens * vocab)


def _row(clock: Clock, ceilings: Ceilings, name: str, pair: dict[str, Work], floor_bytes: int) -> list[dict[str, Any]]:
    costs = clock.costs(pair, name, head_start=True)
    if costs.keys() != pair.keys():
        return []
    triton, torch_cost, floor_ms = costs["triton"], costs["torch"], floor_bytes / ceilings.copy_tb_per_s / 1e9
    figures = {"ms": triton.ms, "launches": triton.launches, "torch_ms": torch_cost.ms, "floor_ms": floor_ms}
    more = {"torch_launches": torch_cost.launches, "peak_gib": triton.peak_gib, "torch_peak_gib": torch_cost.peak_gib}
    return [{"kernel": name, **figures, "copy_share": floor_ms / triton.ms, **more}]


def _pass(operation: Operation, which: str, of: TorchElementwise) -> Work:
    if which == "forward":
        return torch.no_grad()(lambda: operation.call(of))
    out = operation.call(of)
    incoming = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, operation.leaves, incoming, retain_graph=True)


def losses(clock: Clock, ceilings: Ceilings, tiny: bool) -> list[dict[str, Any]]:
    """Measure the loss from hidden states of student and teacher, both gradients included, one row per size."""
    rows: list[dict[str, Any]] = []
    widths = TINY if tiny else Widths()
    for tokens, vocab in widths.losses:
        name = f"loss [{tokens:,} x {vocab:,}]"
        if not clock.in_time(name):
            continue
        hidden, head, teacher_hidden, teacher_head = (
            torch.randn(count, widths.hidden, device=clock.device).mul_(scale).bfloat16()
            for count, scale in 2 * ((tokens, 1.0), (vocab, widths.hidden**-0.5))
        )
        leaves = hidden.requires_grad_(), head.requires_grad_()
        main_grad = torch.zeros_like(head, dtype=torch.float32, requires_grad=False)

        def run(
            leaves: tuple[Tensor, Tensor] = leaves,
            teacher: Any = (teacher_hidden, teacher_head),
            main_grad: Tensor = main_grad,
        ) -> None:
            loss = distillation_loss(
                leaves[0], leaves[1], teacher[0], teacher[1], None, None, kl_weight=1.0, cross_entropy_weight=0.0,
                temperature=TEMPERATURE, chunk_tokens=CHUNK_TOKENS, tp_group=None, head_gradient=main_grad,
            )  # fmt: skip
            torch.autograd.grad(loss.total, leaves[0])

        costs = clock.costs({name: run}, "loss")
        flops = 8 * tokens * vocab * widths.hidden  # logits of both, two gradients
        for cost in costs.values():
            share = flops / cost.ms / 1e9 / ceilings.matmul_tflops
            rows.append({"loss": [tokens, vocab], **cost.row(), "flops": flops, "matmul_share": share})
    return rows
