"""A GPU without Transformer Engine, mamba-ssm and apex: PyTorch's attention and scan, our kernels, the loss's chunk."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from elastic.distill.chunk import LossSettings, VocabShard, chunk_loss, fused_chunk_loss
from elastic.distill.kl import distillation_loss
from elastic.model import backends
from elastic.model.attention import SdpaCoreAttention, _attended, attention_by_documents
from elastic.model.backends import GPU_PARTS, Kernels
from elastic.model.documents import Documents, context_spans
from elastic.model.elementwise import TorchElementwise, TritonElementwise
from elastic.model.state_space import TorchStateSpace
from elastic.space.gates import Gates
from elastic.world.groups import Layout
from tests.gpu.test_executions_cuda import SPACE, TOLERANCE
from tests.parity.model_factory import (
    build_lively,
    choices_to_test,
    logits_of,
    one_process,
    outcome_of,
    relative_error,
    soft_weights,
    tokens_for,
)

pytestmark = pytest.mark.gpu

# One rounding less or more in every norm, gate and convolution; in fp32 the order of sums alone.
TWIN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: TOLERANCE[torch.bfloat16]}


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    torch.cuda.set_device(0)
    with one_process("nccl"):
        yield


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing_parts", lambda: iter([(part, "not installed") for part in GPU_PARTS]))


@pytest.mark.usefixtures("nothing_installed")
def test_kernels_without_any_package_train_the_model() -> None:
    chosen = Kernels.choose(torch.device("cuda"))
    assert isinstance(chosen.state_space, TorchStateSpace) and isinstance(chosen.elementwise, TritonElementwise)
    assert chosen.core_attention is SdpaCoreAttention
    model = build_lively(SPACE, Layout(dtype=torch.bfloat16), chosen)
    weights = {axis: weight.detach().cuda().requires_grad_() for axis, weight in soft_weights(SPACE, 5).items()}
    logits = logits_of(model, tokens_for(SPACE.parent, length=96).cuda(), Gates.mask(weights))
    logits.float().square().mean().backward()
    leaves = [*model.parameters(), *weights.values()]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert all(weight.grad.any() for weight in weights.values())


@pytest.mark.parametrize("gates", ["none", "soft masks", "slice"])
@pytest.mark.parametrize("dtype", list(TWIN_TOLERANCE))
def test_a_whole_model_with_our_kernels_equals_pytorchs(gates: str, dtype: torch.dtype) -> None:
    tokens, outcomes = tokens_for(SPACE.parent, length=96).cuda(), []
    for elementwise in (TritonElementwise(), TorchElementwise()):
        model = build_lively(SPACE, Layout(dtype=dtype), Kernels(TorchStateSpace(16), SdpaCoreAttention, elementwise))
        weights = {axis: weight.detach().cuda().requires_grad_() for axis, weight in soft_weights(SPACE, 3).items()}
        own = {
            "none": None,
            "soft masks": Gates.mask(weights),
            "slice": Gates.slice(SPACE.subnet(choices_to_test(SPACE)[0])),
        }[gates]
        leaves = dict(model.named_parameters())
        if gates == "soft masks":
            leaves |= {str(axis): weight for axis, weight in weights.items()}
        outcomes.append(outcome_of(logits_of(model, tokens, own), leaves))
    ours, twin = outcomes
    assert ours.logits.isfinite().all() and relative_error(ours.logits, twin.logits) <= TWIN_TOLERANCE[dtype]
    for name, expected in twin.gradients.items():
        assert relative_error(ours.gradients[name], expected) <= 3 * TWIN_TOLERANCE[dtype], name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("query_heads", [2, 8])
def test_chunks_of_context_parallel_ranks_attend_like_the_whole(
    query_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Two ranks hold chunks 0 and 3, 1 and 2 of the sequence; each attends to the keys up to its own end."""
    length, channels = 128, 32
    leaves = [
        torch.randn(length, 2, heads, channels, device="cuda").to(dtype).requires_grad_()
        for heads in (query_heads, 2, 2)
    ]
    query, keys, values = leaves[0], leaves[1].permute(1, 2, 0, 3), leaves[2].permute(1, 2, 0, 3)
    ends = [length // 4 * (chunk + 1) for chunk in range(4)]
    chunks = zip(query.split(length // 4), ends, strict=True)
    together = torch.cat([_attended(own, keys[:, :, :end], values[:, :, :end]) for own, end in chunks])
    whole = F.scaled_dot_product_attention(
        *(leaf.double().permute(1, 2, 0, 3) for leaf in leaves), is_causal=True, enable_gqa=True
    )
    whole = whole.permute(2, 0, 1, 3).flatten(2)
    assert relative_error(together, whole) <= tolerance
    weights = torch.randn_like(whole)
    ours = torch.autograd.grad(together, leaves, weights.to(dtype))
    for found, expected in zip(ours, torch.autograd.grad(whole, leaves, weights), strict=True):
        assert relative_error(found, expected) <= 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 300), (64, 9000)])
def test_the_fused_chunk_equals_the_plain_one_in_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher = (3 * torch.randn(*shape, device="cuda").to(dtype) for _ in range(2))
    labels, weights = torch.randint(shape[1], shape[:1], device="cuda"), torch.rand(shape[0], device="cuda")
    settings = LossSettings(0.7, 0.3, 1.5, True, VocabShard(0, shape[1], shape[1], None))
    exact, gradient = chunk_loss(student.double(), teacher.double(), labels, weights.double(), settings)
    found, found_gradient = fused_chunk_loss(student, teacher, labels, weights, settings, torch.float32)
    assert gradient is not None and found_gradient is not None
    assert relative_error(found, exact) <= 1e-5 and relative_error(found_gradient, gradient) <= 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk_tokens", [17, 50])
def test_the_loss_equals_log_softmax_in_fp64(chunk_tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    """The loss as it trains on a GPU: products into fp32 logits, our kernels, gradients of hidden states and head."""
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(rows, width, device="cuda").div(scale).to(dtype)
        for rows, width, scale in ((50, 64, 1.0), (900, 64, 8.0), (50, 96, 1.0), (900, 96, 10.0))
    )
    leaves = hidden.requires_grad_(), head.requires_grad_()
    terms = dict(kl_weight=1.0, cross_entropy_weight=0.0, temperature=1.0)
    loss = distillation_loss(
        *leaves, teacher_hidden, teacher_head, None, None, **terms, chunk_tokens=chunk_tokens, tp_group=None
    )
    q = (hidden.double() @ head.double().t()).log_softmax(-1)
    p = (teacher_hidden.double() @ teacher_head.double().t()).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum()
    assert relative_error(loss.total, expected) <= tolerance
    found = torch.autograd.grad(loss.total, leaves)
    for mine, right in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(mine, right) <= tolerance


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("rows", [([100, 155, 1], [256]), ([1] * 256, [3, 253])])
def test_the_kernel_for_isolated_documents_equals_the_loop(rows: tuple[list[int], ...], size: int) -> None:
    """In bf16 torch's variable-length flash attention, in fp32 one call a piece; on every context rank."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows]).int()
    leaves = [torch.randn(256, 2, heads, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2)]
    group = SimpleNamespace(size=lambda: 1)  # keys and values of all ranks are here
    for rank in range(size):
        documents = Documents.of(positions, torch.device("cuda"), rank, size)
        assert documents is not None
        own, outcomes = torch.cat([torch.arange(*span) for span in context_spans(256, rank, size)]).cuda(), []
        for dtype in (torch.bfloat16, torch.float32):
            query, key, value = (leaf.to(dtype) for leaf in leaves)
            context = attention_by_documents(query[own], key, value, documents, group).float()
            weights = torch.linspace(-1, 1, context.numel(), device="cuda").sin().view_as(context)
            outcomes.append([context, *torch.autograd.grad(context, leaves, weights)])
        for found, expected in zip(*outcomes, strict=True):
            assert relative_error(found, expected) <= TOLERANCE[torch.bfloat16]
