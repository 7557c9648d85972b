"""Fingerprints see every bit, wherever it is, and nothing but bits."""

import pytest
import torch

from elastic.train.sanity import _CHUNK, fingerprint, text_fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_equal_bits_give_equal_numbers_and_one_other_value_does_not(dtype: torch.dtype) -> None:
    values = (torch.randn(7, 5) * 10).to(dtype)
    same = values.clone()
    assert fingerprint(values).item() == fingerprint(same).item()
    for place in range(values.numel()):
        changed = values.clone()
        bits = changed.view(-1).view(torch.int8)
        bits[place * values.element_size()] ^= 1
        assert fingerprint(changed).item() != fingerprint(values).item()


def test_it_is_the_weighted_sum_of_the_bits_modulo_two_to_the_64() -> None:
    values = torch.randn(50)
    expected = sum(
        bits * (2 * 0x9E3779B97F4A7C15 * place + 1) for place, bits in enumerate(values.view(torch.int32).tolist())
    )
    assert fingerprint(values).item() % 2**64 == expected % 2**64


def test_swapped_values_and_two_changes_that_cancel_in_a_plain_sum_are_seen() -> None:
    values = torch.arange(10, dtype=torch.int32)
    assert fingerprint(values.flip(0)).item() != fingerprint(values).item()
    shifted = values.clone()
    shifted[2] += 1
    shifted[7] -= 1
    assert fingerprint(shifted).item() != fingerprint(values).item()


def test_chunks_and_strides_do_not_matter() -> None:
    values = torch.arange(2 * _CHUNK + 3, dtype=torch.int16)
    assert fingerprint(values[: _CHUNK + 1].view(1, -1)).item() == fingerprint(values[: _CHUNK + 1]).item()
    last = values.clone()
    last[-1] ^= 1
    assert fingerprint(last).item() != fingerprint(values).item()
    square = torch.randn(6, 6)
    assert fingerprint(square.t()).item() == fingerprint(square.t().contiguous()).item()
    assert fingerprint(torch.zeros(0)).item() == 0


def test_nan_and_negative_zero_are_bits_like_others() -> None:
    nan = torch.tensor([float("nan")])
    assert fingerprint(nan).item() == fingerprint(nan.clone()).item()
    assert fingerprint(torch.tensor([0.0])).item() != fingerprint(torch.tensor([-0.0])).item()


def test_text_differs_with_what_it_says() -> None:
    assert text_fingerprint((1, "a")) == text_fingerprint((1, "a")) != text_fingerprint((1, "b"))
    assert -(2**63) <= text_fingerprint("x") < 2**63
