"""What docs/extending.md claims for its examples; `test_extending.py` runs it in a copy that has them."""

import math
from pathlib import Path

import torch

import elastic
from elastic.config.inputs import SubnetConfig
from elastic.config.sections import SpaceConfig
from elastic.model.cache import MambaCache, empty_cache
from elastic.model.sharding import shard_tensor
from elastic.rank.permutation import Ranking
from elastic.router.budget_loss import budget_loss
from elastic.router.router import Router
from elastic.space.axes import Axis
from elastic.space.cost import Budget, Deployment, Metric, shape_cost, subnet_cost
from elastic.space.layers import parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.reach import out_of_reach, sample_subnet
from elastic.space.shape import LayerPattern, ModelShape
from elastic.space.space import AxisChoices, Space
from tests.nested import permuted_tensors, submodel_tensors
from tests.parity import test_executions as executions
from tests.parity.model_factory import Outcome, choices_to_test, one_process, relative_error, shape_of


def axis() -> None:
    """Choices, router slots, exact cost, and four executions with one outcome, gradients included."""
    axis = Axis("mamba_state")
    section = SpaceConfig(
        mamba_state=AxisChoices((8, 5, 2)), hidden=AxisChoices((24, 16)), mamba_head=AxisChoices((6, 4)), lanes=4
    )
    space = section.space(shape_of("M-M*M", mamba_heads=6))
    assert axis in space.elastic_axes() and Router(space, num_budgets=2).sizes[axis] == (1, 3)
    by_hand = SubnetConfig(name="by_hand", mamba_state=5).subnet(space.parent)
    assert by_hand == space.subnet({axis: (1,)}) and by_hand.shape(space.parent).mamba_state == 5
    full, cut = shape_cost(space.parent), subnet_cost(space.parent, by_hand)
    assert cut.params < full.params and cut.ssm_bytes * 8 == full.ssm_bytes * 5
    budget = Budget("small", Metric.DEPLOY_BYTES, ratio=0.8).absolute(space.parent, Deployment())
    logits = Router(space, num_budgets=1)()
    probabilities = {axis: values.softmax(-1) for axis, values in logits.items()}
    loss = budget_loss(space, [budget], probabilities, Deployment()).sum()
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(loss, list(logits.values())))
    cache = empty_cache(space.parent, by_hand, 4).layers[0]
    assert isinstance(cache, MambaCache) and cache.state.shape[-1] == 5
    executions.SPACES["extended"] = space
    with one_process():
        for index in range(len(choices_to_test(space))):
            exact = executions._run_slice("extended", index)
            for run in (executions._run_mask, executions._run_submodel):
                assert all(error <= executions.BOUND for error in errors(run("extended", index), exact).values()), run
            # Stock transformers runs in fp32: no further off than our own submodel there, beyond the order of sums.
            noise = errors(executions._run_submodel("extended", index, torch.float32), exact)
            for name, error in errors(executions._run_hugging_face("extended", index), exact).items():
                assert error <= 10 * max(noise[name], torch.finfo(torch.float32).eps), name


def errors(one: Outcome, exact: Outcome) -> dict[str, float]:
    """Return relative errors of the logits and of every parameter's gradient."""
    found = {name: relative_error(one.gradients[name], gradient) for name, gradient in exact.gradients.items()}
    return found | {"logits": relative_error(one.logits, exact.logits)}


def layer_kind() -> None:
    """Pattern, choices, exact parameter counts, cuts that no number of ranks changes, permutation."""
    parent = ModelShape(
        pattern=LayerPattern.parse("GMG"), vocab=20, hidden=8, ffn=(), mamba_heads=(4,), head_channels=2,
        mamba_groups=2, mamba_state=2, conv_kernel=2, attention_heads=(), kv_heads=1, attention_channels=2,
        gated_ffn=(16, 16),
    )  # fmt: skip
    choices = AxisChoices((16, 8), per_layer=True)
    space = Space(parent, {Axis("gated_ffn"): choices, Axis.HIDDEN: AxisChoices((8, 5))}, lanes=4)
    assert Router(space, num_budgets=1).sizes[Axis("gated_ffn")] == (2, 2)
    subnet = space.subnet({Axis("gated_ffn"): (0, 1), Axis.HIDDEN: (1,)})
    sizes = {name: parameter_size(name, parent) for name in parameter_names(parent)}
    whole = {name: torch.arange(float(math.prod(size))).view(size) for name, size in sizes.items()}
    assert sum(tensor.numel() for tensor in whole.values()) == shape_cost(parent).params
    cut = submodel_tensors(whole, parent, subnet, space.lanes)
    assert sum(tensor.numel() for tensor in cut.values()) == subnet_cost(parent, subnet).params
    name = "decoder.layers.2.gated_mlp.linear_fc1.weight"
    kept = [row for row in range(32) if row % 4 < 2]  # two rows of each of 4 lanes, of gate and of up
    assert torch.equal(cut[name], whole[name][kept, :5])
    assert torch.equal(shard_tensor(whole[name], name, parent, 1, 2), whole[name][[*range(8, 16), *range(24, 32)]])
    permuted = permuted_tensors(whole, parent, Ranking.identity(parent), space.lanes)
    assert torch.equal(permuted[name], whole[name]), "not ranked: the parent's order"


def metric() -> None:
    """A ratio becomes a target, a subnet is found for it, and the router's loss pulls towards it."""
    parent, deployment = shape_of("M-M*M", mamba_heads=6), Deployment(length_tokens=64)
    space = Space(parent, {Axis.MAMBA_HEAD: AxisChoices((6, 4, 2)), Axis.MAMBA_CHANNEL: AxisChoices((6, 4, 3))})
    budget = Budget("small", Metric("cache_bytes"), ratio=0.7).absolute(parent, deployment)
    assert out_of_reach(space, budget, deployment) is None
    used = sample_subnet(space, budget, deployment).cost
    assert used[budget.metric] == used.kv_bytes + used.ssm_bytes + used.conv_bytes
    logits = Router(space, num_budgets=1)()
    probabilities = {axis: values.softmax(-1) for axis, values in logits.items()}
    loss = budget_loss(space, [budget], probabilities, deployment).sum()
    assert loss > 0 and all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(logits.values())))


if __name__ == "__main__":
    assert Path(elastic.__file__).is_relative_to(Path.cwd()), "the copy is what runs"
    metric()
    layer_kind()
    axis()
