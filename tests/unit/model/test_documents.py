"""Documents are cut into what a rank attends with: pieces, and the rows that a variable-length kernel is given."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.model.attention import ElasticSelfAttention, _attended_packed, attention_by_documents
from elastic.model.documents import Documents, Piece, context_spans
from elastic.world.groups import Layout, world

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with world(Layout()):
        yield


def positions_of(*rows: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows]).int()


def documents_of(*rows: list[int], **context: int) -> Documents:
    found = Documents.of(positions_of(*rows), CPU, **context)
    assert found is not None
    return found


def test_rows_of_one_document_each_need_nothing() -> None:
    assert Documents.of(None, CPU) is None
    assert Documents.of(positions_of([5], [5]), CPU) is None


def test_documents_are_counted_over_the_rows() -> None:
    found = documents_of([2, 3], [5])
    assert found.lengths == (2, 3, 5)
    assert found.pieces == (Piece(0, 2, 2), Piece(1, 3, 3), Piece(2, 5, 5))
    assert found.numbers.tolist() == [[0, 0, 1, 1, 1], [0] * 5] and found.numbers.dtype is torch.int32
    assert found.packed.query_ends.tolist() == found.packed.key_ends.tolist() == [0, 2, 5, 10]
    assert (found.packed.most_queries, found.packed.most_keys, found.packed.key_rows) == (5, 5, None)


@pytest.mark.parametrize("broken", [[1, 2, 3], [0, 1, 3], [0, 1, 1], [0, -1, 0]])
def test_positions_that_skip_are_our_own_bug(broken: list[int]) -> None:
    with pytest.raises(AssertionError, match="gap"):
        Documents.of(torch.tensor([broken], dtype=torch.int32), CPU)


def attended(query: Tensor, key: Tensor, value: Tensor, may_see: Tensor) -> Tensor:
    """Attend [s, h, A] over [S, kv, A] under a mask of all pairs."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = (t.transpose(0, 1).repeat_interleave(repeats, dim=0) for t in (key, value))
    return F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, may_see).transpose(0, 1).flatten(1)


def varlen(query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, *rest: Any) -> Tensor:
    """Do what the kernel promises: every piece by itself, causal from the last query and key backwards."""
    found = []
    for piece in range(len(query_ends) - 1):
        own, seen = (slice(int(ends[piece]), int(ends[piece + 1])) for ends in (query_ends, key_ends))
        queries, keys = own.stop - own.start, seen.stop - seen.start
        assert queries <= rest[0] and keys <= rest[1]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        found.append(attended(query[own], key[seen], value[seen], mask))
    return torch.cat(found)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", [([5, 6, 1], [12]), ([1] * 12, [3, 9]), ([2, 4, 6], [7, 2, 3])])
def test_every_way_sees_the_earlier_tokens_of_the_own_document(rows: tuple[list[int], ...], size: int) -> None:
    """The loop over pieces, and the rows made for a kernel, against a mask of all pairs, on every context rank."""
    query, key, value = (torch.randn(12, 2, heads, 8).double() for heads in (4, 2, 2))
    for rank in range(size):
        documents = documents_of(*rows, cp_rank=rank, cp_size=size)
        own = torch.cat([torch.arange(*span) for span in context_spans(12, rank, size)])
        assert sum(piece.num_queries for piece in documents.pieces) == 2 * len(own)
        expected, packed = [], documents.packed
        for row, numbers in enumerate(documents.numbers):
            may_see = (numbers[own, None] == numbers) & (own[:, None] >= torch.arange(12))
            expected.append(attended(query[own, row], key[:, row], value[:, row], may_see))
        # What `_whole_sequences` gathers, whose test is at real layouts, is given here.
        group = SimpleNamespace(size=lambda: 1)
        looped = attention_by_documents(query[own], key, value, documents, group)
        torch.testing.assert_close(looped, torch.stack(expected, dim=1))
        rows_of = [t.transpose(0, 1).flatten(0, 1) for t in (query[own], key, value)]
        if packed.key_rows is not None:
            rows_of[1:] = [t[packed.key_rows] for t in rows_of[1:]]
        kernel = varlen(*rows_of, packed.query_ends, packed.key_ends, packed.most_queries, packed.most_keys)
        torch.testing.assert_close(kernel, torch.cat(expected))


def test_torchs_kernel_takes_the_rows_and_has_gradients() -> None:
    """On tensors without memory, and so of any layout that it would refuse by shape or type; its numbers: tests/gpu."""
    meta = torch.device("meta")
    documents = Documents.of(positions_of([5, 6, 1], [12]), meta, 1, 2)
    assert documents is not None
    leaves = [torch.empty(length, heads, 8, dtype=torch.bfloat16, device=meta, requires_grad=True)
              for length, heads in ((12, 4), (24, 2), (24, 2))]  # fmt: skip
    context = _attended_packed(*leaves, documents)
    assert context.shape == leaves[0].shape
    gradients = torch.autograd.grad(context, leaves, torch.empty_like(context))
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]


def test_transformer_engine_is_given_its_packed_layout() -> None:
    """Rows [B * S, heads, A], documents' ends as int32, a causal mask, which Megatron-Core turns into a padding one."""
    query, key, value = (torch.randn(12, 2, heads, 8).double() for heads in (4, 2, 2))
    documents, calls = documents_of([5, 6, 1], [12]), []

    def core_attention(*rows: Tensor | None, attn_mask_type: str, packed_seq_params: Any) -> Tensor:
        calls.append(packed_seq_params)
        assert attn_mask_type == "causal" and rows[3] is None
        ends, most = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        assert packed_seq_params.cu_seqlens_kv is ends and ends.dtype is torch.int32
        assert packed_seq_params.max_seqlen_kv == most == 12 and packed_seq_params.qkv_format == "thd"
        return varlen(*rows[:3], ends, ends, most, most)  # type: ignore[arg-type]

    group = SimpleNamespace(size=lambda: 1)
    own: Any = SimpleNamespace(
        core_attention=core_attention, attn_mask_type="causal", pg_collection=SimpleNamespace(cp=group)
    )
    found = ElasticSelfAttention._by_documents(own, query, key, value, documents)
    assert len(calls) == 1
    torch.testing.assert_close(found, attention_by_documents(query, key, value, documents, group))
