"""The budget sampler: frequencies, independence of streams, and the same draws at every layout."""

import pytest
import torch

from elastic.router.sampler import budget_of, draw_budgets, stream

# 99.9% quantiles of the chi-square distribution, by degrees of freedom.
CHI_SQUARE = {2: 13.82, 8: 26.12}


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_pitfall_12_budgets_follow_the_weights(draws):
    weights = (0.5, 0.3, 0.2)
    counts = torch.zeros(3)
    for step in range(4_000 // draws):
        for budget in draw_budgets(weights, 11, step, draws):
            counts[budget] += 1
    expected = counts.sum() * torch.tensor(weights)
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE[2]


def test_pitfall_12_first_draws_of_many_runs_follow_the_weights():
    counts = torch.zeros(3)
    for seed in range(3000):
        counts[draw_budgets((1, 1, 1), seed, 0, 1)[0]] += 1
    assert ((counts - 3000 / 3) ** 2 / (3000 / 3)).sum() < CHI_SQUARE[2]


def test_successive_steps_are_independent():
    table = torch.zeros(3, 3)
    previous = draw_budgets((1, 1, 1), 0, 0, 1)[0]
    for step in range(1, 3601):
        current = draw_budgets((1, 1, 1), 0, step, 1)[0]
        table[previous, current] += 1
        previous = current
    assert ((table - 400) ** 2 / 400).sum() < CHI_SQUARE[8]


@pytest.mark.parametrize("draws", [3, 7, 10])
def test_each_step_is_stratified(draws):
    weights = (0.5, 0.3, 0.2)
    for step in range(200):
        drawn = draw_budgets(weights, 5, step, draws)
        for budget, weight in enumerate(weights):
            assert abs(drawn.count(budget) - draws * weight) < 1.0 + 1e-9


def test_a_budget_of_weight_zero_is_never_drawn():
    assert all(1 not in draw_budgets((0.5, 0.0, 0.5), 2, step, 4) for step in range(500))


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_pitfall_15_every_layout_assigns_the_same_budgets_and_no_replica_waits(replicas):
    drawn, num_micro_batches = draw_budgets((1, 1, 1), 9, 4, 6), 24
    alone = [budget_of(drawn, g, num_micro_batches) for g in range(num_micro_batches)]
    local = num_micro_batches // replicas
    per_replica = [
        [budget_of(drawn, index * replicas + replica, num_micro_batches) for index in range(local)]
        for replica in range(replicas)
    ]
    assert all(own == per_replica[0] for own in per_replica)
    assert [per_replica[g % replicas][g // replicas] for g in range(num_micro_batches)] == alone


def test_streams_differ_by_purpose_and_numbers():
    drawn = [torch.rand(3, generator=stream(1, *key)) for key in (("a", 1), ("b", 1), ("a", 2), ("a", 1, 0), ("a", 11))]
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
