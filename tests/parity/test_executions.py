"""masked == sliced == submodel == stock transformers: same logits, same gradients on the kept weights (DESIGN 4)."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic.compress.hf_config import HfSettings, hf_config
from elastic.compress.hf_names import to_hf
from elastic.compress.slicing import submodel_tensors
from elastic.modules.gate import GatesError
from elastic.modules.model import ElasticModel, Layout, build_model
from elastic.space.axes import Axis, Space
from elastic.space.gates import Execution, Gates
from elastic.space.subnet import Subnet
from tests.parity.model_factory import (
    EVERY_AXIS,
    SPACES,
    Outcome,
    build_lively,
    choices_to_test,
    cotangent,
    fill,
    one_hot_weights,
    one_process,
    relative_error,
    smallest_choice,
    soft_weights,
    submodel_space,
    tokens_for,
)
from tests.parity.reference_model import reference_logits

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
CASES = [(name, index) for name in SPACES for index in range(len(choices_to_test(SPACES[name])))]
HF_CASES = [(name, index) for name, index in CASES if name != "Mamba heads per layer"]


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield
        _parent.cache_clear()
        _outcome.cache_clear()


@cache
def _parent(name: str) -> ElasticModel:
    return build_lively(SPACES[name])


def _subnet(name: str, index: int) -> Subnet:
    return SPACES[name].subnet(choices_to_test(SPACES[name])[index])


def _backward(logits: Tensor, parameters: dict[str, Tensor]) -> Outcome:
    """Push the fixed cotangent back; an unused parameter has gradient None, recorded as zeros."""
    gradients = torch.autograd.grad(logits, list(parameters.values()), cotangent(logits), allow_unused=True)
    filled = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients, strict=True)
    ]
    return Outcome(logits.detach(), dict(zip(parameters, filled, strict=True)))


def _logits(model: ElasticModel, tokens: Tensor, gates: Gates | None) -> Tensor:
    return (model(tokens, gates) @ model.head_weight(gates).T).transpose(0, 1)


def _run(model: ElasticModel, gates: Gates) -> Outcome:
    tokens = tokens_for(model.decoder.resolver.space.parent)
    return _backward(_logits(model, tokens, gates), dict(model.named_parameters()))


def _run_mask(name: str, index: int) -> Outcome:
    space = SPACES[name]
    return _run(_parent(name), Gates.mask(one_hot_weights(space, choices_to_test(space)[index])))


def _run_slice(name: str, index: int) -> Outcome:
    return _run(_parent(name), Gates.slice(_subnet(name, index)))


def _run_submodel(name: str, index: int) -> Outcome:
    """Run a standalone model on copied weights; its gradients are carried back to the parent's parameters."""
    space, subnet, parent = SPACES[name], _subnet(name, index), dict(_parent(name).named_parameters())
    shape = subnet.shape(space.parent)
    cut = dict(submodel_tensors(parent, space.parent, subnet, space.lanes))
    standalone = build_model(submodel_space(shape), Layout())
    assert {n: p.shape for n, p in standalone.named_parameters()} == {n: t.shape for n, t in cut.items()}
    fill(standalone, cut, shape)
    logits = _logits(standalone, tokens_for(shape), None)
    own = _backward(logits, dict(standalone.named_parameters())).gradients
    back = torch.autograd.grad(list(cut.values()), list(parent.values()), [own[n] for n in cut], allow_unused=True)
    gradients = {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parent.items(), back, strict=True)
    }
    return Outcome(logits.detach(), gradients)


def _run_hugging_face(name: str, index: int) -> Outcome:
    """Run stock transformers on exported tensors that still know the parent's parameters they were cut from."""
    space, subnet, parent = SPACES[name], _subnet(name, index), dict(_parent(name).named_parameters())
    shape = subnet.shape(space.parent)
    exported = dict(to_hf(dict(submodel_tensors(parent, space.parent, subnet, space.lanes)), shape))
    config = NemotronHConfig(**hf_config(shape, HfSettings(), torch.float32))
    values = {n: t.detach().clone() for n, t in exported.items()}
    stock = NemotronHForCausalLM.from_pretrained(None, config=config, state_dict=values).train()
    in_memory = {n.replace("backbone.", "model.", 1): t for n, t in exported.items()}
    assert in_memory.keys() == dict(stock.named_parameters()).keys()
    inputs = {"input_ids": tokens_for(shape), "use_cache": False}
    return _backward(torch.func.functional_call(stock, in_memory, kwargs=inputs).logits, parent)


_RUNS: dict[str, Callable[[str, int], Outcome]] = {
    "mask": _run_mask,
    "slice": _run_slice,
    "submodel": _run_submodel,
    "hugging face": _run_hugging_face,
}


@cache
def _outcome(execution: str, name: str, index: int) -> Outcome:
    return _RUNS[execution](name, index)


def _assert_equal(name: str, index: int, first: str, second: str) -> None:
    one, other = _outcome(first, name, index), _outcome(second, name, index)
    assert one.logits.shape == other.logits.shape
    assert relative_error(one.logits, other.logits) <= LOGITS_TOLERANCE
    for parameter, expected in other.gradients.items():
        error = relative_error(one.gradients[parameter], expected)
        assert error <= GRADIENT_TOLERANCE, f"gradient of {parameter}: {error:.1e}"


@pytest.mark.parametrize(("name", "index"), CASES)
def test_pitfall_01_mask_equals_slice(name: str, index: int) -> None:
    """The embedding and every layer output are gated, so nothing of the hidden tail reaches the head."""
    _assert_equal(name, index, "mask", "slice")


@pytest.mark.parametrize(("name", "index"), CASES)
def test_pitfall_18_slice_equals_submodel(name: str, index: int) -> None:
    """A hard choice computes exactly what the cut-out model computes: no activation is scaled by a probability."""
    _assert_equal(name, index, "slice", "submodel")


@pytest.mark.parametrize(("name", "index"), HF_CASES)
def test_submodel_equals_stock_transformers(name: str, index: int) -> None:
    _assert_equal(name, index, "submodel", "hugging face")


def test_cases_reduce_everything_at_once() -> None:
    """The narrowest choice of the widest case cuts all six axes, differs between layers and drops some."""
    for space in SPACES.values():
        narrow = space.subnet(smallest_choice(space))
        assert narrow.hidden < space.parent.hidden and len(narrow.kept_layers) < len(space.parent.pattern)
    assert set(SPACES["two groups, depth 7"].elastic_axes()) == set(Axis)
    drawn = [_subnet("four groups, five queries per KV head, depth 10", index) for index in range(4)]
    assert any(len(set(subnet.ffn)) > 1 for subnet in drawn)
    assert any(len(set(_subnet("Mamba heads per layer", index).mamba_heads)) > 1 for index in range(4))


@pytest.mark.parametrize("execution", ["mask", "slice"])
@pytest.mark.parametrize("name", SPACES)
def test_gradient_of_cut_weights_is_exactly_zero(name: str, execution: str) -> None:
    """What the submodel does not hold gets exactly no gradient, skipped layers included."""
    space, subnet = SPACES[name], _subnet(name, 0)
    ones = {n: torch.ones_like(p, requires_grad=True) for n, p in _parent(name).named_parameters()}
    cut = list(submodel_tensors(ones, space.parent, subnet, space.lanes))
    kept = torch.autograd.grad(
        sum(tensor.sum() for _, tensor in cut), list(ones.values()), allow_unused=True, materialize_grads=True
    )
    gradients = _outcome(execution, name, 0).gradients
    num_cut = 0
    for parameter, keeps in zip(ones, kept, strict=True):
        assert torch.count_nonzero(gradients[parameter][keeps == 0]) == 0, parameter
        num_cut += int((keeps == 0).sum())
    assert num_cut > 0.3 * sum(keeps.numel() for keeps in kept)


def test_pitfall_02_a_skipped_layer_changes_the_output_and_is_not_run() -> None:
    space = SPACES["two groups, depth 7"]
    model, tokens = _parent("two groups, depth 7"), tokens_for(space.parent)
    full = Subnet.full(space.parent)
    shallow = space.subnet({Axis.DEPTH: (2,)})
    skipped = set(full.kept_layers) - set(shallow.kept_layers)
    entered: list[int] = []
    # Registered by the test on its own model; the package itself uses no hooks.
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        for index, layer in enumerate(model.decoder.layers)
    ]
    sliced = _logits(model, tokens, Gates.slice(shallow))
    for handle in handles:
        handle.remove()
    assert entered == list(shallow.kept_layers) and skipped
    whole = _logits(model, tokens, Gates.slice(full))
    assert relative_error(sliced, whole) > 0.05
    for layer_index in skipped:  # and each single layer matters
        kept = tuple(index for index in full.kept_layers if index != layer_index)
        without = _logits(model, tokens, Gates.slice(Subnet(**{**vars(full), "kept_layers": kept})))
        assert relative_error(without, whole) > 0.01


def test_no_gates_is_the_whole_parent() -> None:
    name = "two groups, depth 7"
    model, tokens = _parent(name), tokens_for(SPACES[name].parent)
    whole = _logits(model, tokens, None)
    torch.testing.assert_close(whole, _logits(model, tokens, Gates.slice(Subnet.full(SPACES[name].parent))))
    full_weights = one_hot_weights(SPACES[name], {axis: (0,) * SPACES[name].num_slots(axis) for axis in Axis})
    assert relative_error(_logits(model, tokens, Gates.mask(full_weights)), whole) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["soft", "one-hot"])
def test_pitfall_20_mask_agrees_with_an_independent_reference(name: str, kind: str) -> None:
    """Values, weight gradients and gate gradients equal a slow fp64 model written from DESIGN 4 alone."""
    space = SPACES[name]
    model = build_lively(space).double()
    if kind == "soft":
        weights = soft_weights(space, seed=5, dtype=torch.float64)
    else:
        weights = one_hot_weights(space, choices_to_test(space)[1], torch.float64)
    tokens = tokens_for(space.parent)
    parameters = dict(model.named_parameters())
    leaves = parameters | {f"gate {axis}": weight for axis, weight in weights.items()}
    ours = _backward(_logits(model, tokens, Gates.mask(weights)), leaves)
    theirs = _backward(reference_logits(parameters, space, weights, tokens), leaves)
    assert relative_error(ours.logits, theirs.logits) <= 1e-9
    for leaf, expected in theirs.gradients.items():
        assert relative_error(ours.gradients[leaf], expected) <= 1e-8, leaf
        assert kind == "one-hot" or torch.count_nonzero(expected) > 0, leaf


def test_soft_mask_in_fp32_agrees_with_the_reference() -> None:
    model = build_lively(EVERY_AXIS)
    weights, tokens = soft_weights(EVERY_AXIS, seed=6), tokens_for(EVERY_AXIS.parent)
    wide = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = reference_logits(wide, EVERY_AXIS, {axis: w.detach().double() for axis, w in weights.items()}, tokens)
    assert relative_error(_logits(model, tokens, Gates.mask(weights)), expected) <= LOGITS_TOLERANCE


def test_pitfall_17_gate_gradient_is_finite_for_every_choice() -> None:
    """Probability 0 or 1 on any choice of any axis leaves a finite gradient on all of its choices."""
    model, tokens = build_lively(EVERY_AXIS), tokens_for(EVERY_AXIS.parent)
    for axis in EVERY_AXIS.elastic_axes():
        for index in range(len(EVERY_AXIS.axes[axis].choices)):
            choice = {other: (0,) * EVERY_AXIS.num_slots(other) for other in Axis}
            choice[axis] = (index,) * EVERY_AXIS.num_slots(axis)
            weights = one_hot_weights(EVERY_AXIS, choice)
            logits = _logits(model, tokens, Gates.mask(weights))
            for gradient in torch.autograd.grad(logits, list(weights.values()), cotangent(logits)):
                assert torch.isfinite(gradient).all() and torch.count_nonzero(gradient) > 0


def test_pitfall_23_recompute_sees_its_own_micro_batch() -> None:
    """Two micro-batches with different gates are in flight at once; recomputing gives the same gradients."""
    plain, recomputing = build_lively(EVERY_AXIS), build_lively(EVERY_AXIS, Layout(recompute=True))
    tokens = tokens_for(EVERY_AXIS.parent)
    outcomes = []
    for model in (plain, recomputing):
        weights = [soft_weights(EVERY_AXIS, seed) for seed in (1, 2)]
        narrow = Gates.slice(EVERY_AXIS.subnet(smallest_choice(EVERY_AXIS)))
        logits = [_logits(model, tokens, gates) for gates in (*(Gates.mask(w) for w in weights), narrow)]
        # All forward passes are done before the first backward, as under 1F1B.
        for one in logits:
            one.backward(cotangent(one))
        leaves = [p.grad for p in model.parameters()] + [w.grad for each in weights for w in each.values()]
        outcomes.append(leaves)
    for one, other in zip(*outcomes, strict=True):
        assert one is not None and torch.equal(one, other)


def test_pitfall_26_unknown_keywords_and_packed_sequences_are_refused() -> None:
    model = _parent("two groups, depth 7")
    tokens = tokens_for(model.decoder.resolver.space.parent)
    for keyword in ("packed_seq_params", "attention_mask", "labels", "anything"):
        with pytest.raises(TypeError, match=keyword):
            model(tokens, None, **{keyword: None})
    mixer, attention = model.decoder.layers[0].mixer, model.decoder.layers[3].self_attention.core_attention
    with pytest.raises(ValueError, match="packed"):
        mixer._ssm_training(torch.zeros(1), packed_seq_params=object())
    with pytest.raises(ValueError, match="packed"):
        attention(*(torch.zeros(1, 1, 1, 1),) * 3, packed_seq_params=object())


def test_pitfall_26_sequences_of_a_batch_do_not_see_each_other() -> None:
    model = _parent("two groups, depth 7")
    tokens = tokens_for(model.decoder.resolver.space.parent)
    together = _logits(model, tokens, None)
    for row in range(tokens.shape[0]):
        assert relative_error(together[row : row + 1], _logits(model, tokens[row : row + 1], None)) <= 1e-6


def test_model_is_causal() -> None:
    """Changing the last token moves no earlier logit, gated or not."""
    model = _parent("two groups, depth 7")
    space = model.decoder.resolver.space
    tokens = tokens_for(space.parent)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % space.parent.vocab
    for gates in (None, Gates.mask(soft_weights(space, 3)), Gates.slice(space.subnet(smallest_choice(space)))):
        one, other = _logits(model, tokens, gates), _logits(model, changed, gates)
        torch.testing.assert_close(one[:, :-1], other[:, :-1])
        assert not torch.allclose(one[:, -1], other[:, -1])


def _misplaced() -> list[tuple[Gates, str]]:
    space = SPACES["two groups, depth 7"]
    weights = one_hot_weights(space, smallest_choice(space))
    full = Subnet.full(space.parent)
    return [
        (Gates(Execution.SLICE), "slice execution takes a subnet"),
        (Gates(Execution.SLICE, subnet=full, weights=weights), "slice execution takes a subnet"),
        (Gates(Execution.MASK, subnet=full, weights=weights), "mask execution takes weights"),
        (Gates.mask({Axis.HIDDEN: torch.ones(1, 2)}), "this space expects"),
        (Gates.slice(Subnet(**{**vars(full), "ffn": (15, 16, 16)})), "multiples of 4"),
        (Gates.slice(Subnet(**{**vars(full), "mamba_heads": (3, 4, 4)})), "not a multiple of mamba_groups"),
        (Gates.slice(Subnet(**{**vars(full), "hidden": 25})), "hidden = 25"),
    ]


@pytest.mark.parametrize(("gates", "message"), _misplaced())
def test_gates_that_do_not_fit_are_refused(gates: Gates, message: str) -> None:
    model = _parent("two groups, depth 7")
    with pytest.raises((GatesError, ValueError), match=message):
        model(tokens_for(model.decoder.resolver.space.parent), gates)


def test_pitfall_21_weights_over_an_axis_without_choices_are_refused() -> None:
    space = SPACES["no attention"]
    assert not space.is_elastic(Axis.ATTENTION_HEAD)
    with pytest.raises(GatesError, match="attention_head"):
        _parent("no attention")(tokens_for(space.parent), Gates.mask({Axis.ATTENTION_HEAD: torch.ones(1, 1)}))


def test_space_of_a_submodel_has_nothing_to_choose() -> None:
    subnet = _subnet("two groups, depth 7", 0)
    shape = subnet.shape(SPACES["two groups, depth 7"].parent)
    assert submodel_space(shape).elastic_axes() == ()
    assert isinstance(submodel_space(shape), Space)
