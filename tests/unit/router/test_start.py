"""A router that begins with given subnets: exactly those, whatever it says of the other budgets stays."""

import pytest
import torch

from elastic.router import start
from elastic.router.decide import RouterError, likeliest
from elastic.router.router import Router
from elastic.router.start import MARGIN, start_at
from elastic.space.reach import choice_indices, smallest_subnet
from tests.shapes import random_choice
from tests.unit.space.test_reach import SPACE


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_begins_with_its_subnet_and_the_others_keep_theirs_bit_for_bit(seed: int) -> None:
    router = Router(SPACE, num_budgets=3, hidden_width=64, seed=seed)
    before = {axis: values.detach().clone() for axis, values in router().items()}
    subnet = SPACE.subnet(random_choice(SPACE, torch.Generator().manual_seed(seed)))
    start_at(router, 1, choice_indices(SPACE, subnet))
    assert likeliest(router, SPACE, 1) == subnet != likeliest(Router(SPACE, 3, 64, seed), SPACE, 1)
    for axis, values in router().items():
        assert torch.equal(values[[0, 2]], before[axis][[0, 2]])
        first, second = values[1].detach().topk(2, dim=-1).values.unbind(-1)
        assert float((first - second).min()) > 0.4 * MARGIN


def test_a_router_too_narrow_for_the_choices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "MOST_ROUNDS", 300)
    router = Router(SPACE, num_budgets=2, hidden_width=1)
    choices = {
        axis: [index % 2 for index in range(len(own))]
        for axis, own in choice_indices(SPACE, smallest_subnet(SPACE)).items()
    }
    before = {name: values.clone() for name, values in router.state_dict().items()}
    with pytest.raises(RouterError, match="hidden_width = 1 is too small"):
        start_at(router, 0, choices)
    assert all(torch.equal(before[name], values) for name, values in router.state_dict().items())
