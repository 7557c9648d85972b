"""What a token may see: earlier tokens of its own sequence, nothing else; packed arguments are refused."""

from collections.abc import Iterator

import pytest
import torch

from elastic.model.model import ElasticModel
from elastic.space.gates import Gates
from tests.parity.model_factory import (
    SPACES,
    build_lively,
    logits_of,
    one_process,
    relative_error,
    smallest_choice,
    soft_weights,
    tokens_for,
)


@pytest.fixture(scope="module")
def model() -> Iterator[ElasticModel]:
    with one_process():
        yield build_lively(SPACES["two groups, depth 7"])


def test_pitfall_26_unknown_keywords_and_packed_sequences_are_refused(model: ElasticModel) -> None:
    tokens = tokens_for(model.decoder.masks.space.parent)
    for keyword in ("packed_seq_params", "attention_mask", "labels", "anything"):
        with pytest.raises(TypeError, match=keyword):
            model(tokens, None, **{keyword: None})
    mixer, attention = model.decoder.layers[0].mixer, model.decoder.layers[3].self_attention.core_attention
    with pytest.raises(ValueError, match="packed"):
        mixer._ssm_training(torch.zeros(1), packed_seq_params=object())
    with pytest.raises(ValueError, match="packed"):
        attention(*(torch.zeros(1, 1, 1, 1),) * 3, packed_seq_params=object())


def test_pitfall_26_sequences_of_a_batch_do_not_see_each_other(model: ElasticModel) -> None:
    tokens = tokens_for(model.decoder.masks.space.parent)
    together = logits_of(model, tokens, None)
    for row in range(tokens.shape[0]):
        assert relative_error(together[row : row + 1], logits_of(model, tokens[row : row + 1], None)) <= 1e-6


def test_model_is_causal(model: ElasticModel) -> None:
    """Changing the last token moves no earlier logit, gated or not."""
    space = model.decoder.masks.space
    tokens = tokens_for(space.parent)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % space.parent.vocab
    for gates in (None, Gates.mask(soft_weights(space, 3)), Gates.slice(space.subnet(smallest_choice(space)))):
        one, other = logits_of(model, tokens, gates), logits_of(model, changed, gates)
        torch.testing.assert_close(one[:, :-1], other[:, :-1])
        assert not torch.allclose(one[:, -1], other[:, -1])
