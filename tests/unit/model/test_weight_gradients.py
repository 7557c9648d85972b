"""Weight gradients of nested products: in the wrapper's buffer as without one, at once and only where they belong."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.config.sections import OptimConfig
from elastic.kernels import products
from elastic.model.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from elastic.model.model import ElasticModel, Layout
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut, kept_indices
from elastic.train.optimizer import wrap_for_training
from tests.parity.model_factory import (
    SPACES,
    build_lively,
    choices_to_test,
    cotangent,
    logits_of,
    one_process,
    relative_error,
    soft_weights,
    tokens_for,
)

SPACE = SPACES["two groups, depth 7"]
LINEARS = (ElasticColumnParallelLinear, ElasticRowParallelLinear)


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def micro_batches(dtype: torch.dtype, masks_only: bool = False) -> list[Gates | None]:
    """Return the whole parent, soft masks, and slices that leave layers out: several writers to every weight."""
    slices = [] if masks_only else [Gates.slice(SPACE.subnet(choice)) for choice in choices_to_test(SPACE)]
    wide = torch.promote_types(dtype, torch.float32)
    return [None, *slices, Gates.mask(soft_weights(SPACE, seed=1, dtype=wide)), *slices[:1]]


def push_back(model: ElasticModel, gates: Gates | None) -> None:
    logits = logits_of(model, tokens_for(SPACE.parent), gates)
    logits.backward(cotangent(logits))


def summed(dtype: torch.dtype, masks_only: bool = False) -> dict[str, Tensor]:
    """Return what autograd says without a buffer, micro-batch by micro-batch, summed in at least fp32."""
    model = build_lively(SPACE, Layout(dtype=dtype))
    wide = torch.promote_types(dtype, torch.float32)
    total = {name: torch.zeros(p.shape, dtype=wide) for name, p in model.named_parameters()}
    for gates in micro_batches(dtype, masks_only):
        model.zero_grad()
        push_back(model, gates)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
    return total


def linear_weights(model: ElasticModel) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, LINEARS)}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_buffer_holds_the_sum_of_all_micro_batches(dtype: torch.dtype, overlap: bool) -> None:
    """In steps one after the other; with overlapped reduction the wrapper itself insists on its bookkeeping."""
    model = build_lively(SPACE, Layout(dtype=dtype))
    wrapped = wrap_for_training(model, OptimConfig(overlap_grad_reduce=overlap))
    expected = summed(dtype, masks_only=overlap)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    for _step in range(2):
        wrapped.zero_grad_buffer()
        *others, last = micro_batches(dtype, masks_only=overlap)
        with wrapped.no_sync():
            for gates in others:
                push_back(model, gates)
        push_back(model, last)
        if overlap:
            wrapped.finish_grad_sync()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None and expected[name].any(), name
            # Gates multiply this weight, and its gradient as it is added; autograd's own is rounded to bf16 before.
            rounded = dtype is torch.bfloat16 and name.endswith("linear_proj.weight")
            assert relative_error(parameter.main_grad, expected[name]) <= (2**-9 if rounded else bound), name
        fused = {name for name, parameter in model.named_parameters() if parameter.grad_added_to_main_grad}
        assert fused == linear_weights(model).keys()


class Made(TorchDispatchMode):
    """Notes operations by the size of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, torch.Size]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.seen[func.overloadpacket.__name__, result.shape] += 1
        return result


@pytest.mark.parametrize("sliced", [False, True])
def test_nothing_of_a_weights_full_size_is_filled_or_copied(sliced: bool) -> None:
    model = build_lively(SPACE, Layout(dtype=torch.float32))
    wrap_for_training(model, OptimConfig()).zero_grad_buffer()
    logits = logits_of(
        model, tokens_for(SPACE.parent), Gates.slice(SPACE.subnet(choices_to_test(SPACE)[0])) if sliced else None
    )
    with Made() as made:
        logits.backward(cotangent(logits))
    sizes = {weight.shape for weight in linear_weights(model).values()}
    assert {name for name, size in made.seen if size in sizes} <= {"empty_like", "addmm"}


@pytest.mark.parametrize("kept", [{}, {Axis.HIDDEN: 9}, {Axis.HIDDEN: 9, Axis.MAMBA_HEAD: 2, Axis.MAMBA_CHANNEL: 3}])
def test_products_and_gradients_are_those_of_the_kept_weight(kept: Mapping[Axis, int]) -> None:
    """Against indexing, in both directions."""
    layer = next(
        layer for layer in build_lively(SPACE, Layout(dtype=torch.float64)).decoder.layers if hasattr(layer, "mixer")
    )
    cut = Cut.of_layer(SPACE.parent, 0, kept, lanes=SPACE.lanes)
    for linear, kinds in (
        (layer.mixer.in_proj, (DimKind.IN_PROJ, DimKind.HIDDEN)),
        (layer.mixer.out_proj, (DimKind.HIDDEN, DimKind.INNER)),
    ):
        rows, columns = (kept_indices(cut.grid(kind)) for kind in kinds)
        x = torch.randn(5, 3, len(columns), dtype=torch.float64, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        weight = linear.weight.detach().clone().requires_grad_()
        y, expected = linear.forward_cut(x, cut), other @ weight[rows][:, columns].t()
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
        back = torch.randn_like(y)
        found = torch.autograd.grad(y, (x, linear.weight), back)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (other, weight), back), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("adds", [True, False])
def test_a_gpu_adds_half_precision_products_in_fp32(adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine with a GPU is asked: only that the operations exist and say what they return."""
    monkeypatch.setattr(products, "ADDS_TO_WIDER_SUMS", adds)
    cuts = ({}, {Axis.HIDDEN: 9}, {Axis.HIDDEN: 9, Axis.MAMBA_HEAD: 2, Axis.MAMBA_CHANNEL: 3})
    model = build_lively(SPACE, Layout(dtype=torch.bfloat16))
    linear = next(layer for layer in model.decoder.layers if hasattr(layer, "mixer")).mixer.in_proj
    for kept in cuts:
        part = linear.part(Cut.of_layer(SPACE.parent, 0, kept, lanes=SPACE.lanes))
        r, c = part.inner.kept_size, part.hidden.kept_size
        with FakeTensorMode(), Made() as made:
            total = torch.empty(linear.weight.shape, device="cuda")
            left, right = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((r, 7), (7, c)))
            part.add_product(total, left, right)
        ran = {name: count for (name, _), count in made.seen.items() if name in ("mm", "addmm")}
        assert ran == {"addmm" if adds and part.inner.is_prefix else "mm": 1}
        assert total.dtype is torch.float32
