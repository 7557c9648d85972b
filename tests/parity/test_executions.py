"""masked == sliced == submodel == stock transformers: same logits and gradients on what is kept (docs/design.md 4).

Our executions are compared in fp64. Stock transformers computes parts of a layer in fp32 whatever it is given, so it is
compared in fp32, by what our own submodel loses in fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic.hf.config import hf_config
from elastic.hf.export_settings import HfSettings
from elastic.hf.names import to_hf
from elastic.model.model import ElasticModel, build_model
from elastic.space.axes import Axis, LayerKind
from elastic.space.cost import Deployment, shape_cost, subnet_cost
from elastic.space.gates import Gates
from elastic.space.shape import Subnet
from elastic.world.groups import Layout
from tests.nested import submodel_tensors
from tests.parity.model_factory import (
    SPACES,
    Outcome,
    build_lively,
    choices_to_test,
    fill,
    logits_of,
    one_hot_weights,
    one_process,
    outcome_of,
    relative_error,
    small_chunks,
    smallest_choice,
    submodel_space,
    tokens_for,
)

BOUND = 1e-11
FP64, FP32 = torch.float64, torch.float32
CASES = [(name, index) for name in SPACES for index in range(len(choices_to_test(SPACES[name])))]
HF_CASES = [(name, index) for name, index in CASES if name != "Mamba heads per layer"]


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield
        _parent.cache_clear()
        _outcome.cache_clear()


@cache
def _parent(name: str, dtype: torch.dtype = FP64) -> ElasticModel:
    return build_lively(SPACES[name], Layout(dtype=dtype))


def _subnet(name: str, index: int) -> Subnet:
    return SPACES[name].subnet(choices_to_test(SPACES[name])[index])


def _run(model: ElasticModel, gates: Gates) -> Outcome:
    tokens = tokens_for(model.decoder.masks.space.parent)
    return outcome_of(logits_of(model, tokens, gates), dict(model.named_parameters()))


def _run_mask(name: str, index: int) -> Outcome:
    space = SPACES[name]
    return _run(_parent(name), Gates.mask(one_hot_weights(space, choices_to_test(space)[index], FP64)))


def _run_slice(name: str, index: int) -> Outcome:
    return _run(_parent(name), Gates.slice(_subnet(name, index)))


def _run_submodel(name: str, index: int, dtype: torch.dtype = FP64) -> Outcome:
    """Run a standalone model on copied weights; its gradients are carried back to the parent's parameters."""
    space, subnet, parent = SPACES[name], _subnet(name, index), dict(_parent(name, dtype).named_parameters())
    shape = subnet.shape(space.parent)
    cut = submodel_tensors(parent, space.parent, subnet, space.lanes)
    standalone = build_model(submodel_space(shape), Layout(dtype=dtype), kernels=small_chunks())
    assert {n: p.shape for n, p in standalone.named_parameters()} == {n: t.shape for n, t in cut.items()}
    fill(standalone, cut, shape)
    # docs/pitfalls.md 4, on what is really built.
    assert sum(p.numel() for p in standalone.parameters()) == subnet_cost(space.parent, subnet).params
    logits = logits_of(standalone, tokens_for(shape), None)
    own = outcome_of(logits, dict(standalone.named_parameters())).gradients
    back = torch.autograd.grad(list(cut.values()), list(parent.values()), [own[n] for n in cut], allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parent.items(), back, strict=True)}
    return Outcome(logits.detach(), gradients)


def _run_hugging_face(name: str, index: int) -> Outcome:
    """Run stock transformers on exported tensors that still know the parent's parameters they were cut from."""
    space, subnet, parent = SPACES[name], _subnet(name, index), dict(_parent(name, FP32).named_parameters())
    shape = subnet.shape(space.parent)
    exported = dict(to_hf(submodel_tensors(parent, space.parent, subnet, space.lanes), shape))
    config = NemotronHConfig(**hf_config(shape, HfSettings(), torch.float32))
    values = {n: t.detach().clone() for n, t in exported.items()}
    stock = NemotronHForCausalLM.from_pretrained(None, config=config, state_dict=values).train()
    in_memory = {n.replace("backbone.", "model.", 1): t for n, t in exported.items()}
    assert in_memory.keys() == dict(stock.named_parameters()).keys()
    inputs = {"input_ids": tokens_for(shape), "use_cache": False}
    return outcome_of(torch.func.functional_call(stock, in_memory, kwargs=inputs).logits, parent)


_RUNS: dict[str, Callable[[str, int], Outcome]] = {
    "mask": _run_mask,
    "slice": _run_slice,
    "submodel": _run_submodel,
    "submodel in fp32": partial(_run_submodel, dtype=FP32),
    "hugging face": _run_hugging_face,
}


@cache
def _outcome(execution: str, name: str, index: int) -> Outcome:
    return _RUNS[execution](name, index)


def _assert_equal(name: str, index: int, first: str, second: str) -> None:
    one, other = _outcome(first, name, index), _outcome(second, name, index)
    assert one.logits.shape == other.logits.shape and one.logits.dtype is FP64
    assert relative_error(one.logits, other.logits) <= BOUND
    for parameter, expected in other.gradients.items():
        error = relative_error(one.gradients[parameter], expected)
        assert error <= BOUND, f"gradient of {parameter}: {error:.1e}"


def _errors(execution: str, name: str, index: int) -> tuple[float, dict[str, float]]:
    """Return how far an fp32 execution's logits and gradients are from the submodel in fp64."""
    found, exact = _outcome(execution, name, index), _outcome("submodel", name, index)
    gradients = {n: relative_error(found.gradients[n], gradient) for n, gradient in exact.gradients.items()}
    return relative_error(found.logits, exact.logits), gradients


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
    """It may err as our fp32 does, times 8 for another order of the same sums."""
    (logits, gradients), (own, own_gradients) = (_errors(e, name, index) for e in ("hugging face", "submodel in fp32"))
    assert logits <= 8 * own
    for parameter, error in gradients.items():
        assert error <= 8 * max(own_gradients.values()), parameter


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
    cut = submodel_tensors(ones, space.parent, subnet, space.lanes)
    kept = torch.autograd.grad(
        sum(tensor.sum() for tensor in cut.values()), list(ones.values()), allow_unused=True, materialize_grads=True
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
    sliced = logits_of(model, tokens, Gates.slice(shallow))
    for handle in handles:
        handle.remove()
    assert entered == list(shallow.kept_layers) and skipped
    whole = logits_of(model, tokens, Gates.slice(full))
    assert relative_error(sliced, whole) > 0.05
    for layer_index in skipped:  # and each single layer matters
        kept = tuple(index for index in full.kept_layers if index != layer_index)
        without = logits_of(model, tokens, Gates.slice(replace(full, kept_layers=kept)))
        assert relative_error(without, whole) > 0.01


def test_no_gates_is_the_whole_parent() -> None:
    name = "two groups, depth 7"
    model, tokens = _parent(name), tokens_for(SPACES[name].parent)
    whole = logits_of(model, tokens, None)
    torch.testing.assert_close(whole, logits_of(model, tokens, Gates.slice(Subnet.full(SPACES[name].parent))))
    full_weights = one_hot_weights(SPACES[name], {axis: (0,) * SPACES[name].num_slots(axis) for axis in Axis}, FP64)
    assert relative_error(logits_of(model, tokens, Gates.mask(full_weights)), whole) <= BOUND


def _counted_flops(model: ElasticModel, tokens: Tensor, gates: Gates | None) -> int:
    # The counter knows the plain products of SDPA's mathematical form, not its fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_of(model, tokens, gates)
    return counter.get_total_flops()


@pytest.mark.parametrize("index", range(4))
def test_flops_per_token_are_what_torch_counts(index: int) -> None:
    """Exact without Mamba. The counter ignores causality, so the table is asked for twice the length."""
    space, tokens = SPACES["no Mamba"], tokens_for(SPACES["no Mamba"].parent)
    gates, shape = Gates.slice(_subnet("no Mamba", index)), _subnet("no Mamba", index).shape(space.parent)
    expected = shape_cost(shape, Deployment(length_tokens=2 * tokens.shape[1])).flops_per_token
    assert _counted_flops(_parent("no Mamba"), tokens, gates) == expected * tokens.numel()


@pytest.mark.parametrize("name", SPACES)
def test_pitfall_02_slice_execution_saves_the_flops_it_promises(name: str) -> None:
    """A narrow, shallow subnet runs exactly the matrix products of its submodel; projections are counted exactly."""
    space, subnet = SPACES[name], _subnet(name, 0)
    shape, tokens = subnet.shape(space.parent), tokens_for(space.parent)
    standalone = build_model(submodel_space(shape), Layout(), kernels=small_chunks())
    inside = _counted_flops(_parent(name), tokens, Gates.slice(subnet))
    assert inside == _counted_flops(standalone, tokens, None)
    full = _counted_flops(_parent(name), tokens, Gates.slice(Subnet.full(space.parent)))
    assert inside < full == _counted_flops(_parent(name), tokens, Gates.mask({}))


def test_flops_of_a_mamba_layer_are_its_projections_and_an_estimate_of_the_scan() -> None:
    """One more Mamba layer adds its two projections to what torch counts, and a scan that depends on the chunk."""
    name = "no attention"
    space, full = SPACES[name], Subnet.full(SPACES[name].parent)
    tokens, layer = tokens_for(space.parent), space.parent.pattern.layers_of(LayerKind.MAMBA)[0]
    fewer = replace(full, kept_layers=tuple(index for index in full.kept_layers if index != layer))
    counted = [_counted_flops(_parent(name), tokens, Gates.slice(subnet)) for subnet in (full, fewer)]
    table = [int(subnet_cost(space.parent, subnet).flops_per_token) * tokens.numel() for subnet in (full, fewer)]
    mixer = _parent(name).decoder.layers[layer].mixer
    projections = 2 * tokens.numel() * (mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel())
    for one in (counted, table):
        assert projections < one[0] - one[1] < 3 * projections
