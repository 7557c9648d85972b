"""The kept heads, channels and neurons of a budget are the same at TP 1, 2 and 4, and so are the logits."""

from collections.abc import Mapping

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.initialize import named_global_parameters
from elastic.model.model import ElasticModel
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut, parameter_size, take
from elastic.space.shape import Subnet
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import Layout
from tests.distributed.harness import run_distributed
from tests.nested import submodel_tensors
from tests.parity.model_factory import (
    build_lively,
    choices_to_test,
    fill,
    one_hot_weights,
    relative_error,
    shape_of,
    soft_weights,
    tokens_for,
)

SPACE = Space(
    shape_of(
        "M-*M-*", vocab=64, hidden=32, ffn=64, mamba_heads=16, mamba_groups=4, head_channels=5, attention_heads=12,
        kv_heads=4, conv_kernel=3,
    ),
    {
        Axis.HIDDEN: AxisChoices((32, 21, 12)),
        Axis.FFN: AxisChoices((64, 40, 16), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((16, 12, 4), per_layer=True),
        Axis.MAMBA_CHANNEL: AxisChoices((5, 4, 3)),
        Axis.ATTENTION_HEAD: AxisChoices((12, 8, 4), per_layer=True),
        Axis.DEPTH: AxisChoices((6, 5, 4)),
    },
    depth_ranking=(0, 4, 2, 1, 5, 3),
)  # fmt: skip
CHOICES = choices_to_test(SPACE, count=3)
SIZES = (1, 2, 4)
# By TP size and rank: the element numbers each subnet computes with, and the rank's columns of all logits.
Runs = dict[int, list[tuple[list[dict[str, Tensor]], list[Tensor]]]]
LENGTH = 12  # a multiple of every TP size, so that the sequence can be split


def _element_numbers(name: str) -> Tensor:
    """Return a full parameter whose every element is its own number, exact in fp32."""
    size = parameter_size(name, SPACE.parent)
    return torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size)


def _used_weights(model: ElasticModel, subnet: Subnet) -> dict[str, Tensor]:
    """Collect what the layers of this rank compute with under a subnet, through their own cutting code."""
    layers = model.decoder.masks.layers(Gates.slice(subnet))
    used = {
        "embedding.word_embeddings.weight": model.embedding.word_embeddings.weight[:, : subnet.hidden],
        "decoder.final_norm.weight": model.decoder.final_norm.weight[: subnet.hidden],
        "output_layer.weight": model.head_weight(Gates.slice(subnet)),
    }
    for index, (layer, gate) in enumerate(zip(model.decoder.layers, layers, strict=True)):
        if not gate.skipped:
            own = _layer_weights(layer, str(SPACE.parent.pattern)[index], gate.cut)
            used |= {f"decoder.layers.{index}.{name}": tensor for name, tensor in own.items()}
    return {name: tensor.detach() for name, tensor in used.items()}


def _layer_weights(layer: torch.nn.Module, kind: str, cut: Cut) -> Mapping[str, Tensor]:
    norm = {"M": "norm", "*": "input_layernorm", "-": "pre_mlp_layernorm"}[kind]
    used = {f"{norm}.weight": layer.get_submodule(norm).weight[: cut.grid(DimKind.HIDDEN).kept_size]}
    linears = {
        "M": ("mixer.in_proj", "mixer.out_proj"),
        "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
        "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
    }[kind]
    for name in linears:
        linear = layer.get_submodule(name)
        used[f"{name}.weight"] = linear.part(cut).of(linear.weight)
    if kind == "M":
        cp = layer.mixer._context_parallel(cut)
        used |= {
            "mixer.conv1d_weight": cp.get_conv1d_weight(),
            "mixer.conv1d_bias": cp.get_conv1d_bias(),
            "mixer.A_log": cp.get_A_log(),
            "mixer.D": cp.get_D(),
            "mixer.dt_bias": cp.get_dt_bias(),
            "mixer.norm.weight": take(layer.mixer.norm.weight, 0, cut.grid(DimKind.INNER)),
        }
    return used


def _elements_and_logits(size: int, sequence: bool) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """On one rank: the element numbers used by each subnet, then the rank's columns of the logits of each run."""
    use_cpu_backend()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    model = build_lively(SPACE, Layout(tensor=size, sequence=sequence))
    tokens = tokens_for(SPACE.parent, length=LENGTH)
    gates = [Gates.slice(SPACE.subnet(choice)) for choice in CHOICES]
    gates += [Gates.mask(one_hot_weights(SPACE, choice)) for choice in CHOICES] + [Gates.mask(soft_weights(SPACE, 4))]
    logits = [_local_logits(model, tokens, gate, sequence).detach() for gate in gates]
    names = [name for name, _ in named_global_parameters(model)]
    fill(model, {name: _element_numbers(name) for name in names}, SPACE.parent)
    return [_used_weights(model, SPACE.subnet(choice)) for choice in CHOICES], logits


def _local_logits(model: ElasticModel, tokens: Tensor, gates: Gates, sequence: bool) -> Tensor:
    hidden = model(tokens, gates)
    if sequence:
        hidden = gather_from_sequence_parallel_region(hidden, group=parallel_state.get_tensor_model_parallel_group())
    return hidden @ model.head_weight(gates).T


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Run every TP size once; TP 2 also splits the sequence."""
    return {size: run_distributed(_elements_and_logits, size, size, size == 2) for size in SIZES}


@pytest.mark.parametrize("index", range(len(CHOICES)))
def test_pitfall_19_every_layout_computes_with_the_same_elements(index: int, runs: Runs) -> None:
    """The union over ranks is what the submodel is cut from, and a sharded element lives on one rank only."""
    subnet = SPACE.subnet(CHOICES[index])
    cut = submodel_tensors(_element_numbers, SPACE.parent, subnet, SPACE.lanes)
    expected = {_parent_name(name, subnet): set(t.flatten().tolist()) for name, t in cut.items()}
    for size in SIZES:
        per_rank = [rank[0][index] for rank in runs[size]]
        assert all(rank.keys() == expected.keys() for rank in per_rank)
        for name, elements in expected.items():
            found = [set(rank[name].flatten().tolist()) for rank in per_rank]
            assert set.union(*found) == elements, (size, name)
            replicated = all(one == elements for one in found)
            assert replicated or sum(map(len, found)) == len(elements), (size, name)
            assert len({len(one) for one in found}) == 1, "every rank keeps equally much"


def _parent_name(name: str, subnet: Subnet) -> str:
    """Translate a submodel's parameter name to the parent's."""
    if not name.startswith("decoder.layers."):
        return name
    _, _, local, rest = name.split(".", 3)
    return f"decoder.layers.{subnet.kept_layers[int(local)]}.{rest}"


@pytest.mark.parametrize("size", [2, 4])
def test_logits_do_not_depend_on_tensor_parallelism(size: int, runs: Runs) -> None:
    """Slice, hard mask and soft mask; the gated group norm counts its own groups only, at any TP size."""
    alone = runs[1][0][1]
    for run, expected in enumerate(alone):
        joined = torch.cat([rank[1][run] for rank in runs[size]], dim=-1)
        assert relative_error(joined, expected) <= 1e-5, run
    assert len(alone) == 2 * len(CHOICES) + 1
