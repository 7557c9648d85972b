"""The model on a GPU with what is installed there: against PyTorch's kernels, mask against slice, attentions."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from elastic.model.attention import ElasticSelfAttention, SdpaCoreAttention, attention_by_documents
from elastic.model.backends import Kernels
from elastic.model.cache import empty_cache
from elastic.model.documents import Documents
from elastic.model.model import transformer_config
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import Layout
from tests.parity.model_factory import (
    build_lively,
    choices_to_test,
    logits_of,
    one_hot_weights,
    one_process,
    outcome_of,
    relative_error,
    shape_of,
    soft_weights,
    tokens_for,
)

pytestmark = pytest.mark.gpu

SPACE = Space(
    shape_of(
        "M-*M-*", vocab=128, hidden=64, ffn=128, mamba_heads=8, mamba_groups=2, head_channels=32, mamba_state=32,
        attention_heads=8, kv_heads=2, attention_channels=32,
    ),
    {
        Axis.HIDDEN: AxisChoices((64, 48, 32)),
        Axis.FFN: AxisChoices((128, 64), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((8, 4)),
        Axis.MAMBA_CHANNEL: AxisChoices((32, 24)),
        Axis.ATTENTION_HEAD: AxisChoices((8, 4, 2), per_layer=True),
        Axis.DEPTH: AxisChoices((6, 5, 4)),
    },
    depth_ranking=(0, 2, 4, 1, 5, 3),
)  # fmt: skip
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 4e-2}  # TF32 and bf16 matrix units


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    torch.cuda.set_device(0)
    with one_process("nccl"):
        yield


def cuda_kernels() -> Kernels:
    return Kernels.choose(torch.device("cuda"))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("index", range(len(choices_to_test(SPACE))))
def test_mask_equals_slice(index: int, dtype: torch.dtype) -> None:
    model = build_lively(SPACE, Layout(dtype=dtype), cuda_kernels())
    parameters, tokens = dict(model.named_parameters()), tokens_for(SPACE.parent, length=96).cuda()
    choice = choices_to_test(SPACE)[index]
    weights = {axis: weight.detach().cuda() for axis, weight in one_hot_weights(SPACE, choice).items()}
    mask = outcome_of(logits_of(model, tokens, Gates.mask(weights)), parameters)
    cut = outcome_of(logits_of(model, tokens, Gates.slice(SPACE.subnet(choice))), parameters)
    assert relative_error(mask.logits, cut.logits) <= TOLERANCE[dtype]
    together = [torch.cat([g.float().flatten() for g in run.gradients.values()]) for run in (mask, cut)]
    assert relative_error(together[0], together[1]) <= 3 * TOLERANCE[dtype]


def test_soft_gates_on_the_gpu_equal_the_cpu_kernels() -> None:
    """The same weights and gates through PyTorch's scan and attention, on the same device, fp32."""
    tokens = tokens_for(SPACE.parent, length=96).cuda()
    leaves = []
    for kernels in (cuda_kernels(), None):
        model = build_lively(SPACE, kernels=kernels)
        weights = {axis: w.detach().cuda().requires_grad_() for axis, w in soft_weights(SPACE, 3).items()}
        logits = logits_of(model, tokens, Gates.mask(weights))
        leaves.append(outcome_of(logits, {str(axis): weight for axis, weight in weights.items()}))
    assert relative_error(leaves[0].logits, leaves[1].logits) <= TOLERANCE[torch.float32]
    for axis, expected in leaves[1].gradients.items():
        assert relative_error(leaves[0].gradients[axis], expected) <= 3 * TOLERANCE[torch.float32], axis


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("index", range(len(choices_to_test(SPACE))))
def test_pieces_through_the_caches_equal_one_pass(index: int, dtype: torch.dtype) -> None:
    """The training kernels in one pass; SDPA, step kernels and products on views in pieces."""
    model = build_lively(SPACE, Layout(dtype=dtype), cuda_kernels()).eval()
    subnet, tokens = SPACE.subnet(choices_to_test(SPACE)[index]), tokens_for(SPACE.parent, length=96).cuda()
    gates, device = Gates.slice(subnet), torch.device("cuda")
    cache = empty_cache(SPACE.parent, subnet, 96, batch=2, dtype=dtype, device=device)
    hidden = [model(piece, gates, cache=cache) for piece in tokens.split([70, 1, 1, 20, 1, 3], dim=1)]
    logits = (torch.cat(hidden) @ model.head_weight(gates).T).transpose(0, 1)
    assert relative_error(logits, logits_of(model, tokens, gates)) <= TOLERANCE[dtype]


def test_recompute_in_bf16_changes_nothing() -> None:
    tokens, gradients = tokens_for(SPACE.parent, length=96).cuda(), []
    for recompute in ("none", "full"):
        model = build_lively(SPACE, Layout(dtype=torch.bfloat16, recompute=recompute), cuda_kernels())
        logits = logits_of(model, tokens, Gates.slice(SPACE.subnet(choices_to_test(SPACE)[0])))
        logits.float().square().mean().backward()
        gradients.append({n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) <= TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("heads", [8, 4, 2])
def test_transformer_engine_attends_with_fewer_query_heads(heads: int, isolated: bool) -> None:
    """Built for 8 query heads, called with fewer on the same 2 KV heads, as the slice execution does."""
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed (`gpu` extra)")
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    shape = SPACE.parent
    config = transformer_config(shape, Layout(dtype=torch.bfloat16))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    common = dict(layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=groups)
    engine = TEDotProductAttention(config, **common)
    reference = SdpaCoreAttention(copy.copy(config), **common)

    def draw(count: int) -> Tensor:
        size = (64, 2, count, shape.attention_channels)
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16).requires_grad_()

    leaves = [draw(heads), draw(shape.kv_heads), draw(shape.kv_heads)]
    if isolated:
        positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in (1, 40, 23)]).expand(2, -1)
        documents = Documents.of(positions, torch.device("cuda"))
        assert documents is not None
        own: Any = SimpleNamespace(core_attention=engine, attn_mask_type=AttnMaskType.causal, pg_collection=groups)
        actual = ElasticSelfAttention._by_documents(own, *leaves, documents)
        expected = attention_by_documents(*leaves, documents, groups.cp)
    else:
        actual, expected = engine(*leaves, None, attn_mask_type=AttnMaskType.causal), reference(*leaves)
    assert actual.shape == expected.shape == (64, 2, heads * shape.attention_channels)
    assert relative_error(actual, expected) <= 1e-2
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
    ):
        assert relative_error(one, other) <= 2e-2
