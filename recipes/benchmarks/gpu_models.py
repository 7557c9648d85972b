"""Eight layers at the widths of the 12B on one GPU: plain, under masks, sliced, as submodels, and as the teacher."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from elastic.model.backends import Kernels
from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.initialize import initial_tensor, named_global_parameters
from elastic.model.model import ElasticModel, transformer_config
from elastic.model.specs import elastic_stack_spec, plain_stack_spec
from elastic.plan.flops import backward_flops, forward_flops
from elastic.plan.work import KernelSet, MicroBatchWork
from elastic.space.gates import Execution, Gates
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import Space
from elastic.world.groups import Layout
from recipes.benchmarks._clock import Ceilings, Clock, Work
from recipes.benchmarks.conversion import WIDTHS
from recipes.benchmarks.execution import elastic_space, soft_gates
from recipes.benchmarks.full_size import PATTERN

LAYOUT = Layout(dtype=torch.bfloat16)
MIXES = ("M-M-M-M*", "M-M-M-M-")
TINY = dict(hidden=64, ffn=128, mamba_heads=16, head_channels=8, mamba_groups=2, mamba_state=16, conv_kernel=4,
            attention_heads=8, kv_heads=2, attention_channels=8)  # fmt: skip
VOCAB = 128  # the loss has cases of its own
# Shares of hidden, FFN, Mamba heads and query heads: 4480, 17408, 112 and 32 of the 9B, 4096, 15360, 96 and 24 of a 6B.
# The heads' channels stay at 80, so that the scan is tuned once.
SUBNETS = {"9B": (7 / 8, 0.85, 7 / 8, 4 / 5), "6B": (4 / 5, 3 / 4, 3 / 4, 3 / 5)}


@dataclass(frozen=True)
class Step:
    """The tokens of a sequence and of one of 512 GPUs in a step of the curriculum's phase with that length."""

    length: int
    tokens_per_gpu: int


STEPS = (Step(8192, 8192 * 1536 // 512), Step(49152, 49152 * 512 // 512))


def model_shape(mix: str, tiny: bool) -> ModelShape:
    """Return the shape of a mix of layers at the widths of the 12B."""
    widths: dict[str, Any] = {**(TINY if tiny else WIDTHS), "vocab": VOCAB}
    return ModelShape.uniform(mix, **widths)


def subnet_at(shape: ModelShape, shares: tuple[float, ...]) -> Subnet:
    """Cut every width but the heads' channels to its share, in whole groups and lanes; all layers stay."""
    hidden, ffn, mamba_heads, attention_heads = shares

    def cut(widths: tuple[int, ...], share: float, parts: int) -> tuple[int, ...]:
        return tuple(max(1, round(width * share / parts)) * parts for width in widths)

    return replace(
        Subnet.full(shape),
        hidden=round(shape.hidden * hidden),
        ffn=cut(shape.ffn, ffn, 8),
        mamba_heads=cut(shape.mamba_heads, mamba_heads, shape.mamba_groups),
        attention_heads=cut(shape.attention_heads, attention_heads, shape.kv_heads),
    )


def built(shape: ModelShape, space: Space | None = None) -> HybridModel:
    """Build the elastic model of a space, or a stock one; weights are drawn on the device, which takes no time."""
    use_cpu_backend()
    kernels = Kernels.choose()
    plain = plain_stack_spec(kernels, shape.conv_kernel)
    model = (HybridModel if space is None else ElasticModel)(
        transformer_config(shape, LAYOUT),
        plain if space is None else elastic_stack_spec(space, kernels),
        vocab_size=shape.vocab,
        max_sequence_length=1,
        hybrid_layer_pattern=str(shape.pattern),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    with torch.no_grad():
        for name, parameter in named_global_parameters(model):
            if parameter.dim() > 1 and "conv1d" not in name:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.copy_(initial_tensor(name, shape, 0, 0.02))
    return model


def cases_of(shape: ModelShape, tokens: Tensor) -> dict[str, Work]:
    """Return what runs each case once: forward and backward, of the teacher forward alone."""
    plain, full = built(shape), Space(shape, {})
    cases = {"plain": _trained(lambda: plain(tokens, None, None), plain)}
    parent: Any = None
    for num_choices in (3, 5):
        space = elastic_space(shape, num_choices)
        parent = built(shape, space)
        weights = soft_gates(space).weights
        gates = Gates.mask({axis: leaf.detach().to(tokens.device).requires_grad_() for axis, leaf in weights.items()})
        cases[f"mask {num_choices}"] = _elastic(parent, tokens, gates)
    for name, shares in SUBNETS.items():
        subnet = subnet_at(shape, shares)
        cut = subnet.shape(shape)
        cases[f"slice {name}"] = _elastic(parent, tokens, Gates.slice(subnet))
        cases[f"submodel {name}"] = _elastic(built(cut, Space(cut, {})), tokens, None)
    teacher = built(shape, full)
    cases["teacher"] = lambda: _without_gradients(teacher, tokens)
    return cases


def run(clock: Clock, ceilings: Ceilings, loss_ms_per_token: float | None, tiny: bool) -> list[dict[str, Any]]:
    """Measure all mixes and lengths that there is time for, one row per case."""
    rows: list[dict[str, Any]] = []
    for step in (Step(4, 8),) if tiny else STEPS:
        for mix in MIXES:
            group = f"{mix} at {step.length:,} tokens"
            if clock.in_time(group):
                rows += _rows(clock, ceilings, mix, step, loss_ms_per_token, tiny)
            gc.collect()  # a model and its modules refer to each other
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _rows(
    clock: Clock, ceilings: Ceilings, mix: str, step: Step, loss_ms_per_token: float | None, tiny: bool
) -> list[dict[str, Any]]:
    shape = model_shape(mix, tiny)
    tokens = torch.randint(VOCAB, (1, step.length), device=clock.device)
    costs = clock.costs(cases_of(shape, tokens), f"{mix} at {step.length:,} tokens")
    rows = []
    for case, cost in costs.items():
        flops = case_flops(shape, step.length, case)
        row = {"case": case, "layers": mix, "tokens": step.length, **cost.row(), "flops": flops}
        row["matmul_share"] = flops / cost.ms / 1e9 / ceilings.matmul_tflops
        if case not in ("plain", "teacher"):
            against = f"submodel {case.split()[1]}" if case.startswith("slice") else "plain"
            if against in costs:
                turns = zip(cost.rounds_ms, costs[against].rounds_ms, strict=True)
                row |= {"against": against, "ratio": statistics.median(a / b for a, b in turns)}
        if loss_ms_per_token is not None and case != "teacher" and "teacher" in costs:
            whole = model_shape(PATTERN, tiny)
            more = case_flops(whole, step.length, case) / flops
            per_token_ms = (cost.ms + costs["teacher"].ms) * more / step.length + loss_ms_per_token
            row["step_s"] = per_token_ms * step.tokens_per_gpu / 1e3
        rows.append(row)
    return rows


def case_flops(shape: ModelShape, length: int, case: str) -> float:
    """Count the products of a case as the plan does for fused kernels, whichever ran; the small head is left out."""
    shares = SUBNETS.get(case.split()[-1])
    subnet = Subnet.full(shape) if shares is None else subnet_at(shape, shares)
    execution = Execution.MASK if case.startswith("mask") else Execution.SLICE
    run = MicroBatchWork(shape, LAYOUT, 1, length, execution, subnet, KernelSet.FUSED)
    forward = forward_flops(run, 0)
    return forward.total if case == "teacher" else (forward + backward_flops(forward, run.kernels)).total


def _elastic(model: Any, tokens: Tensor, gates: Gates | None) -> Work:
    leaves = () if gates is None else tuple(gates.weights.values())
    return _trained(lambda: model(tokens, gates) @ model.head_weight(gates).t(), model, leaves)


def _trained(forward: Callable[[], Tensor], model: Any, leaves: tuple[Tensor, ...] = ()) -> Work:
    """Return forward, a loss on the logits and backward; gradients are dropped, also those of a pass that failed."""

    def run() -> None:
        try:
            forward().float().square().mean().backward()
        finally:
            model.zero_grad(set_to_none=True)
            for leaf in leaves:
                leaf.grad = None

    return run


@torch.no_grad()
def _without_gradients(model: Any, tokens: Tensor) -> None:
    model(tokens, None)
