"""Draws at temperatures that a person can type."""

import pytest
import torch

from elastic.generate.sampling import Sampling

LOGITS = torch.tensor([3.0, 7.5, -2.0, 7.25, 0.0])


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e-7])
@pytest.mark.parametrize("narrowed", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature: float, narrowed: dict[str, float]) -> None:
    sampling = Sampling(temperature=temperature, **narrowed)  # type: ignore[arg-type]
    assert sampling.probabilities(LOGITS).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert sampling.choose(LOGITS * 1e4, position=3) == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 1e30])
def test_others_give_the_softmax_of_the_divided_logits(temperature: float) -> None:
    expected = (LOGITS.double() / temperature).softmax(-1)
    assert torch.allclose(Sampling(temperature=temperature).probabilities(LOGITS).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1.0])
def test_suppressed_tokens_are_never_chosen(temperature: float) -> None:
    sampling = Sampling(temperature=temperature, suppressed=(1, 3))
    assert {sampling.choose(LOGITS, position) for position in range(50)} <= {0, 2, 4}
    if temperature:
        assert sampling.probabilities(LOGITS)[[1, 3]].tolist() == [0.0, 0.0]
