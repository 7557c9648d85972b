"""Gumbel noise: its distribution, its streams, and the softmax behind it."""

import torch

from elastic.router.router import choice_probabilities, gumbel_noise
from elastic.space.axes import Axis


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(0, 0, 0, Axis.FFN, (200, 1000)).double()
    assert abs(noise.mean() - 0.5772) < 0.01  # Euler's constant
    assert abs(noise.var() - torch.pi**2 / 6) < 0.02
    assert noise.isfinite().all()


def test_noise_is_a_pure_function_of_seed_step_micro_batch_and_axis():
    base = (3, 5, 7, Axis.HIDDEN)
    first = gumbel_noise(*base, (1, 4))
    assert torch.equal(first, gumbel_noise(*base, (1, 4)))
    for other in ((4, 5, 7, Axis.HIDDEN), (3, 6, 7, Axis.HIDDEN), (3, 5, 8, Axis.HIDDEN), (3, 5, 7, Axis.DEPTH)):
        assert not torch.equal(first, gumbel_noise(*other, (1, 4)))


def test_pitfall_13_noise_of_axes_is_uncorrelated_and_reaches_every_joint_choice():
    axes = (Axis.HIDDEN, Axis.MAMBA_HEAD, Axis.ATTENTION_HEAD, Axis.DEPTH)
    draws = torch.stack(
        [torch.cat([gumbel_noise(1, step, 0, axis, (1, 3))[0] for axis in axes]) for step in range(4000)]
    )
    correlation = torch.corrcoef(draws.T) - torch.eye(12)
    assert correlation.abs().max() < 0.06
    joint = {tuple(row.view(4, 3).argmax(1).tolist()) for row in draws}
    assert len(joint) == 81


def test_choices_follow_the_logits():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    picks = torch.stack(
        [choice_probabilities(logits, gumbel_noise(0, s, 0, Axis.FFN, (1, 3)), 1.0, 0.1).argmax() for s in range(6000)]
    )
    share = torch.bincount(picks, minlength=3) / 6000
    torch.testing.assert_close(share, logits.softmax(-1)[0], atol=0.03, rtol=0)


def test_pitfall_17_every_choice_has_a_finite_gradient_even_when_sharp():
    logits = torch.tensor([[50.0, 0.0, -50.0]], requires_grad=True)
    probabilities = choice_probabilities(logits, torch.zeros(1, 3), 10.0, 0.05)
    (probabilities * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert logits.grad.isfinite().all()
    assert probabilities.isfinite().all()
