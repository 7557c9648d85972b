"""The mask execution under soft gates against a slow independent model: values, weight gradients, gate gradients."""

from collections.abc import Iterator

import pytest
import torch

from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.world.groups import Layout
from tests.parity.model_factory import (
    EVERY_AXIS,
    SPACES,
    Outcome,
    build_lively,
    choices_to_test,
    cotangent,
    logits_of,
    one_hot_weights,
    one_process,
    outcome_of,
    relative_error,
    smallest_choice,
    soft_weights,
    tokens_for,
)
from tests.parity.reference_model import reference_logits


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["soft", "one-hot"])
def test_pitfall_20_mask_agrees_with_an_independent_reference(name: str, kind: str) -> None:
    """Values, weight gradients and gate gradients equal a slow fp64 model written from docs/design.md 4 alone."""
    space = SPACES[name]
    model = build_lively(space).double()
    if kind == "soft":
        weights = soft_weights(space, seed=5, dtype=torch.float64)
    else:
        weights = one_hot_weights(space, choices_to_test(space)[1], torch.float64)
    tokens = tokens_for(space.parent)
    parameters = dict(model.named_parameters())
    leaves = parameters | {f"gate {axis}": weight for axis, weight in weights.items()}
    ours = outcome_of(logits_of(model, tokens, Gates.mask(weights)), leaves)
    theirs = outcome_of(reference_logits(parameters, space, weights, tokens), leaves)
    assert relative_error(ours.logits, theirs.logits) <= 1e-9
    for leaf, expected in theirs.gradients.items():
        assert relative_error(ours.gradients[leaf], expected) <= 1e-8, leaf
        assert kind == "one-hot" or torch.count_nonzero(expected) > 0, leaf


def test_soft_mask_in_fp32_agrees_with_the_reference() -> None:
    model = build_lively(EVERY_AXIS)
    weights, tokens = soft_weights(EVERY_AXIS, seed=6), tokens_for(EVERY_AXIS.parent)
    wide = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = reference_logits(wide, EVERY_AXIS, {axis: w.detach().double() for axis, w in weights.items()}, tokens)
    assert relative_error(logits_of(model, tokens, Gates.mask(weights)), expected) <= 1e-5


def test_pitfall_17_gate_gradient_is_finite_for_every_choice() -> None:
    """Probability 0 or 1 on any choice of any axis leaves a finite gradient on all of its choices."""
    model, tokens = build_lively(EVERY_AXIS), tokens_for(EVERY_AXIS.parent)
    for axis in EVERY_AXIS.elastic_axes():
        for index in range(len(EVERY_AXIS.axes[axis].choices)):
            choice = {other: (0,) * EVERY_AXIS.num_slots(other) for other in Axis}
            choice[axis] = (index,) * EVERY_AXIS.num_slots(axis)
            weights = one_hot_weights(EVERY_AXIS, choice)
            logits = logits_of(model, tokens, Gates.mask(weights))
            for gradient in torch.autograd.grad(logits, list(weights.values()), cotangent(logits)):
                assert torch.isfinite(gradient).all() and torch.count_nonzero(gradient) > 0


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_pitfall_23_recompute_sees_its_own_micro_batch(recompute: str) -> None:
    """Two micro-batches with different gates are in flight at once; recomputing gives the same gradients."""
    plain, recomputing = build_lively(EVERY_AXIS), build_lively(EVERY_AXIS, Layout(recompute=recompute))
    tokens = tokens_for(EVERY_AXIS.parent)
    outcomes = []
    for model in (plain, recomputing):
        weights = [soft_weights(EVERY_AXIS, seed) for seed in (1, 2)]
        narrow = Gates.slice(EVERY_AXIS.subnet(smallest_choice(EVERY_AXIS)))
        logits = [logits_of(model, tokens, gates) for gates in (*(Gates.mask(w) for w in weights), narrow)]
        # All forward passes are done before the first backward, as under 1F1B.
        for one in logits:
            one.backward(cotangent(one))
        leaves = [p.grad for p in model.parameters()] + [w.grad for each in weights for w in each.values()]
        outcomes.append(leaves)
    for one, other in zip(*outcomes, strict=True):
        assert one is not None and torch.equal(one, other)


def bf16_case(kind: str, dtype: torch.dtype, rounded: bool = False) -> Outcome:
    """Run a mask or a slice in `dtype`; `rounded` gives the weights only the digits that bf16 has."""
    model, weights = build_lively(EVERY_AXIS, Layout(dtype=dtype)), soft_weights(EVERY_AXIS, seed=8)
    if rounded:
        kept = {name: parameter.bfloat16() for name, parameter in model.named_parameters() if not is_wide(name)}
        model.load_state_dict(kept, strict=False)
    gates = Gates.mask(weights) if kind == "mask" else Gates.slice(EVERY_AXIS.subnet(smallest_choice(EVERY_AXIS)))
    logits = logits_of(model, tokens_for(EVERY_AXIS.parent), gates)
    assert logits.dtype is dtype
    return outcome_of(logits, {str(axis): weight for axis, weight in weights.items()})


def is_wide(name: str) -> bool:
    """Tell whether bf16 leaves this parameter in fp32."""
    return name.endswith(("A_log", ".D"))


@pytest.mark.parametrize("kind", ["mask", "slice"])
def test_bf16_stays_near_fp64(kind: str) -> None:
    """Activations are bf16 throughout, gates and their gradients fp32, norms and states wide enough.

    The measure is what the rounding of the weights alone does, in fp64: rounding every activation, and on the way back
    every gradient, adds some of the same (found: 1.4 times for logits, 2.4 times for gradients).
    """
    exact, rounded = bf16_case(kind, torch.float64), bf16_case(kind, torch.float64, rounded=True)
    found = bf16_case(kind, torch.bfloat16)
    assert relative_error(found.logits, exact.logits) <= 5 * relative_error(rounded.logits, exact.logits)
    assert all(gradient.dtype is torch.float32 for gradient in found.gradients.values())
    together = [torch.cat([g.flatten() for g in run.gradients.values()]) for run in (found, rounded, exact)]
    assert relative_error(together[0], together[2]) <= 8 * relative_error(together[1], together[2])
