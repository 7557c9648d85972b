"""The cost table equals what is really built and allocated."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

from elastic.config.load import ConfigError, load
from elastic.hf.config import hf_config
from elastic.hf.export_settings import HfSettings
from elastic.hf.names import hf_sizes
from elastic.space.axes import AXES, INNER_AXIS, Axis, LayerKind
from elastic.space.cost import COUNTED, Budget, Deployment, Metric, Widths, cost, layer_cost, shape_cost, subnet_cost
from elastic.space.layers import LAYER_PARAMETERS, LAYER_PREFIX, parameter_dims
from elastic.space.nesting import Cut, parameter_size
from elastic.space.reach import sample_subnet
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import AxisChoices, Space
from tests.shapes import NANO_12B

NANO_9B_PATTERN = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_4B_PATTERN = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
MODULES = {
    LayerKind.MAMBA: ("norm.", "mixer."),
    LayerKind.ATTENTION: ("input_layernorm.", "self_attention."),
    LayerKind.MLP: ("pre_mlp_layernorm.", "mlp."),
}


def uniform(pattern: str, like: ModelShape, **changes: int) -> ModelShape:
    """Build another published model from one it shares its head sizes with."""
    sizes = dict(ffn=like.ffn[0], mamba_heads=like.mamba_heads[0], attention_heads=like.attention_heads[0])
    kept = {
        name: value
        for name, value in vars(like).items()
        if name not in ("pattern", *(AXES[axis].size for axis in INNER_AXIS.values()))
    }
    return ModelShape.uniform(pattern, **(sizes | kept | changes))


def random_shape(generator: torch.Generator) -> ModelShape:
    """Draw a shape with any mix of layer kinds, groups, kernels, head sizes, and widths that differ per layer."""

    def draw(*options: int) -> int:
        return options[int(torch.randint(len(options), (), generator=generator))]

    pattern = "".join("M-*"[draw(0, 1, 2)] for _ in range(draw(1, 2, 5, 9)))
    groups, kv_heads = draw(1, 2, 4), draw(1, 2)
    shape = ModelShape.uniform(
        pattern,
        vocab=draw(7, 50),
        hidden=draw(5, 12, 16),
        ffn=8,
        mamba_heads=groups,
        head_channels=draw(1, 3, 6),
        mamba_groups=groups,
        mamba_state=draw(1, 4, 5),
        conv_kernel=draw(2, 3, 4),
        attention_heads=kv_heads,
        kv_heads=kv_heads,
        attention_channels=draw(1, 3),
        tied_embeddings=bool(draw(0, 1)),
    )
    return replace(
        shape,
        ffn=tuple(8 * draw(1, 2, 3) for _ in shape.ffn),
        mamba_heads=tuple(groups * draw(1, 2, 3) for _ in shape.mamba_heads),
        attention_heads=tuple(kv_heads * draw(1, 5) for _ in shape.attention_heads),
    )


def random_subnet(parent: ModelShape, generator: torch.Generator) -> Subnet:
    """Draw any subnet the nested layout allows, not only what a list of choices names."""

    def draw(limit: int, multiple: int = 1) -> int:
        return multiple * int(torch.randint(1, limit // multiple + 1, (), generator=generator))

    keep = torch.rand(len(parent.pattern), generator=generator) < 0.7
    kept = tuple(index for index, kept in enumerate(keep.tolist()) if kept) or (0,)
    return Subnet(
        hidden=draw(parent.hidden),
        ffn=tuple(draw(width) for width in parent.ffn),
        mamba_heads=tuple(draw(width, parent.mamba_groups) for width in parent.mamba_heads),
        head_channels=draw(parent.head_channels),
        attention_heads=tuple(draw(width, parent.kv_heads) for width in parent.attention_heads),
        kept_layers=kept,
    )


def parameter_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """List the sizes of all parameters of a model, by the layout table that shards and loads them."""
    names = ["embedding.word_embeddings.weight", "decoder.final_norm.weight"]
    names += [] if shape.tied_embeddings else ["output_layer.weight"]
    for index, kind in enumerate(shape.pattern.kinds):
        names += [f"{LAYER_PREFIX}{index}.{name}" for name in LAYER_PARAMETERS if name.startswith(MODULES[kind])]
    return {name: parameter_size(name, shape) for name in names}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (NANO_12B, 12_310_001_152),
        (uniform(NANO_9B_PATTERN, NANO_12B, hidden=4480, ffn=15680), 8_888_227_328),
        (uniform(NANO_4B_PATTERN, NANO_12B, hidden=3136, ffn=12544, mamba_heads=96), 3_973_556_832),
    ],
    ids=["12B", "9B", "4B"],
)
def test_pitfall_04_published_models_are_counted_exactly(shape: ModelShape, expected: int) -> None:
    params = shape_cost(shape).params
    assert params == expected and isinstance(params, int)


def test_pitfall_04_cost_is_the_sum_of_numel_of_random_subnets() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        parent = random_shape(generator)
        for subnet in (Subnet.full(parent), random_subnet(parent, generator), random_subnet(parent, generator)):
            sizes = parameter_sizes(subnet.shape(parent))
            numel = sum(torch.empty(size, device="meta").numel() for size in sizes.values())
            params = subnet_cost(parent, subnet).params
            assert params == numel and isinstance(params, int), (parent, subnet)
            assert shape_cost(subnet.shape(parent)) == subnet_cost(parent, subnet)


def test_pitfall_03_a_skipped_layer_costs_nothing() -> None:
    """Dropping a layer takes off exactly its own parameters; its width no longer matters."""
    full = Subnet.full(NANO_12B)
    for index in (0, 1, 7):
        kept = tuple(layer for layer in full.kept_layers if layer != index)
        without = subnet_cost(NANO_12B, replace(full, kept_layers=kept))
        kind = NANO_12B.pattern.kinds[index]
        (own, _), field = layer_cost(NANO_12B, kind, NANO_12B.layer_widths(index), 1), AXES[INNER_AXIS[kind]].size
        assert shape_cost(NANO_12B).params - without.params == own > 0
        narrow = {
            field: tuple(8 if n == NANO_12B.pattern.ordinal(index) else w for n, w in enumerate(getattr(full, field)))
        }
        assert subnet_cost(NANO_12B, replace(full, kept_layers=kept, **narrow)) == without
    # One layer must stay; what is left beside it is embedding, head and final norm.
    last = subnet_cost(NANO_12B, replace(full, kept_layers=(0,)))
    layer, _ = layer_cost(NANO_12B, LayerKind.MAMBA, NANO_12B.layer_widths(0), 1)
    assert last.params - layer == 2 * 131072 * 5120 + 5120


@pytest.mark.parametrize("absent", list(LayerKind))
def test_pitfall_11_absent_layer_kinds_and_conv_state(absent: LayerKind) -> None:
    """No division by a head count: a kind may be missing altogether; the conv cache is counted."""
    pattern = "".join(kind for kind in LayerKind if kind is not absent)
    shape = uniform(pattern, NANO_12B)
    total = shape_cost(shape)
    assert (total.kv_bytes == 0) == (absent is LayerKind.ATTENTION)
    assert (total.ssm_bytes == 0) == (absent is LayerKind.MAMBA) == (total.conv_bytes == 0)
    widths = Widths.of(Subnet.full(shape), shape)
    hidden = torch.tensor(float(shape.hidden), requires_grad=True)
    expected = replace(widths, axes={**widths.axes, Axis.HIDDEN: hidden})
    for metric in COUNTED:
        value = cost(shape, expected, Deployment())[metric]
        assert isinstance(value, Tensor) and torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, hidden, retain_graph=True)[0])


def test_pitfall_09_deployment_counts_weights_and_the_caches_that_are_allocated() -> None:
    """Every cache tensor that stock transformers allocates for a prompt is in the table, element for element."""
    shape = ModelShape.uniform(
        "M*-MM*", vocab=32, hidden=16, ffn=24, mamba_heads=6, head_channels=3, mamba_groups=2, mamba_state=5,
        conv_kernel=4, attention_heads=6, kv_heads=2, attention_channels=4,
    )  # fmt: skip
    batch, length = 3, 7
    config = NemotronHConfig(**hf_config(shape, HfSettings(), torch.float32) | {"time_step_min": 0.001})
    model, cache = NemotronHForCausalLM(config).eval(), DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(batch, length, dtype=torch.int64), past_key_values=cache, use_cache=True)
    kv = ssm = conv = 0
    for layer in cache.layers:
        tensors = {name: value for name, value in vars(layer).items() if value is not None}
        kv += sum(tensors[name].numel() for name in ("keys", "values") if name in tensors)
        ssm += sum(t.numel() for t in _tensors(tensors.get("recurrent_states")))
        conv += sum(t.numel() for t in _tensors(tensors.get("conv_states")))
    unit = Deployment(batch=batch, length_tokens=length, weight_bytes=2, kv_bytes=1, ssm_bytes=1, conv_bytes=1)
    total = shape_cost(shape, unit)
    assert (total.kv_bytes, total.ssm_bytes, total.conv_bytes) == (kv, ssm, conv) and min(kv, ssm, conv) > 0
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert total.weight_bytes == 2 * numel and total.deploy_bytes == 2 * numel + kv + ssm + conv


def _tensors(value: object) -> list[Tensor]:
    """Flatten what a cache layer holds: a tensor, or a list or dict of them."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in values for tensor in _tensors(one)]


def test_pitfall_09_a_narrow_subnet_is_charged_for_what_it_holds() -> None:
    """FFN and attention heads leave the caches alone, Mamba heads and channels shrink the states."""
    full, deployment = Subnet.full(NANO_12B), Deployment(batch=2, length_tokens=1000)
    whole = subnet_cost(NANO_12B, full, deployment)
    narrow_ffn = subnet_cost(NANO_12B, replace(full, ffn=(8,) * 28, attention_heads=(8,) * 6), deployment)
    assert narrow_ffn.weight_bytes < whole.weight_bytes
    assert (narrow_ffn.kv_bytes, narrow_ffn.ssm_bytes) == (whole.kv_bytes, whole.ssm_bytes)
    half = subnet_cost(NANO_12B, replace(full, mamba_heads=(64,) * 28), deployment)
    assert half.ssm_bytes * 2 == whole.ssm_bytes and half.conv_bytes < whole.conv_bytes
    assert whole.kv_bytes == 6 * 2 * 8 * 128 * 1000 * 2 * 2
    assert whole.ssm_bytes == 28 * 128 * 80 * 128 * 2 * 4


def test_pitfall_10_absolute_targets_and_ratios_do_not_mix() -> None:
    """The untouched parent meets the budget made of ratio 1 exactly, in every metric."""
    for metric in COUNTED:
        budget = Budget("full", metric, ratio=1.0).absolute(NANO_12B, Deployment())
        assert subnet_cost(NANO_12B, Subnet.full(NANO_12B))[metric] / budget.limit - 1 == 0
    absolute = Budget("6B", Metric.PARAMS, 6.0e9)
    assert absolute.absolute(NANO_12B, Deployment()) == absolute and absolute.limit == 6.0e9
    for wrong in ({"ratio": 0.0}, {"ratio": 1.5}, {"ratio": 6.0e9}, {"target": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load(Budget, {"name": "wrong", **wrong})


@pytest.mark.parametrize("field", ["batch", "length_tokens", "weight_bytes", "kv_bytes", "ssm_bytes", "conv_bytes"])
def test_deployment_refuses_values_that_are_not_positive(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load(Deployment, {field: 0})


def test_layout_table_and_cost_agree_on_every_parameter() -> None:
    """The layout that cuts a parameter keeps as many elements as the submodel's own parameter has."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        parent = random_shape(generator)
        subnet = random_subnet(parent, generator)
        shape = subnet.shape(parent)
        for local, layer_index in enumerate(subnet.kept_layers):
            kind = parent.pattern.kinds[layer_index]
            cut = Cut.of_layer(parent, layer_index, subnet.layer_widths(parent, layer_index))
            for name in (n for n in LAYER_PARAMETERS if n.startswith(MODULES[kind])):
                own = parameter_size(f"{LAYER_PREFIX}{local}.{name}", shape)
                kinds = parameter_dims(f"{LAYER_PREFIX}{layer_index}.{name}")
                assert tuple(cut.grid(kind).kept_size for kind in kinds) == own


@pytest.mark.parametrize("seed", range(12))
def test_the_stored_size_is_what_a_hugging_face_folder_holds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parent = uniform("M-*M-*-", NANO_12B, hidden=64, ffn=48, mamba_heads=16, vocab=50, tied_embeddings=seed % 2 == 0)
    subnet = random_subnet(parent, generator)
    subnet = replace(subnet, mamba_heads=(8,) * len(parent.mamba_heads))  # a stock folder has one width for all
    used = subnet_cost(parent, subnet)
    stored = sum(math.prod(size) for size in hf_sizes(subnet.shape(parent)).values())
    assert used.stored_params == used[Metric.STORED_PARAMS] == stored >= used.params
    # Certain choices cost the same as tensors, with a gradient.
    widths = Widths.of(subnet, parent)
    ffn = tuple(torch.tensor(float(width), dtype=torch.float64, requires_grad=True) for width in subnet.ffn)
    keep = tuple(torch.tensor(float(kept), dtype=torch.float64) for kept in widths.keep)
    expected = cost(parent, Widths({**widths.axes, Axis.FFN: ffn}, keep), Deployment()).stored_params
    assert isinstance(expected, torch.Tensor) and expected.item() == stored
    expected.backward()


def test_a_budget_can_ask_for_the_stored_size() -> None:
    parent = uniform("M-*-", NANO_12B, hidden=64, ffn=64, mamba_heads=16, tied_embeddings=True, vocab=500)
    axes = {
        Axis.FFN: AxisChoices((64, 48, 32, 16, 8), per_layer=True),
        Axis.HIDDEN: AxisChoices(tuple(range(64, 31, -2))),
    }
    budget = Budget("small", Metric.STORED_PARAMS, ratio=0.7).absolute(parent, Deployment())
    sample = sample_subnet(Space(parent, axes), budget, Deployment())
    stored = sum(math.prod(size) for size in hf_sizes(sample.subnet.shape(parent)).values())
    assert sample.cost.stored_params == stored and stored == pytest.approx(budget.limit, rel=0.03)
    assert stored > sample.cost.params + 400 * 32
