"""Names, permutation and slicing against stock transformers: same bits, same logits."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastic.hf.config import ExportError
from elastic.hf.folder import open_hf_folder
from elastic.hf.names import HfTensorError, from_hf, hf_sizes, to_hf
from elastic.rank.permutation import Ranking
from elastic.space.axes import LayerKind
from elastic.space.cost import shape_cost
from elastic.space.layers import parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape, Subnet
from tests.nested import permuted_tensors, submodel_tensors
from tests.parity.hf_models import SHAPES, identical, logits, relative_error, stock_model, stock_model_of, tiny

LANES = 4
TOKENS = torch.randint(40, (2, 33), generator=torch.Generator().manual_seed(0))


def file_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("model.", "backbone.", 1): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    state = dict(stock_model(shape).to(dtype).state_dict())
    ours = dict(from_hf(state, shape))
    assert {key: tuple(tensor.shape) for key, tensor in ours.items()} == {
        key: parameter_size(key, shape) for key in parameter_names(shape)
    }
    assert sum(tensor.numel() for tensor in ours.values()) == shape_cost(shape).params
    assert identical(dict(to_hf(ours, shape)), file_names(state))
    assert identical(dict(from_hf(file_names(state), shape)), ours), "the names of a file give another model"


def test_a_folder_that_stock_transformers_saved_is_read(tmp_path: Path) -> None:
    shape = SHAPES["groups 1, odd head channels"]
    model = stock_model(shape)
    model.save_pretrained(tmp_path)
    opened = open_hf_folder(tmp_path)
    assert opened.shape == shape
    assert identical(dict(from_hf(opened.tensors, shape)), dict(from_hf(model.state_dict(), shape)))


@pytest.mark.parametrize("name", SHAPES)
def test_permuted_parent_gives_the_same_logits(name: str) -> None:
    shape = SHAPES[name]
    parent = stock_model(shape)
    tensors = dict(from_hf(parent.state_dict(), shape))
    permuted = permuted_tensors(tensors, shape, random_ranking(shape), LANES)
    assert relative_error(logits(stock_model_of(permuted, shape), TOKENS), logits(parent, TOKENS)) < 1e-5
    changed = [key for key in tensors if not torch.equal(tensors[key], permuted[key])]
    assert len(changed) == len(tensors), "some parameter was not touched, so nothing is shown for it"


def random_ranking(shape: ModelShape) -> Ranking:
    def order(length: int) -> tuple[int, ...]:
        drawn = torch.randperm(length).tolist()
        return tuple(drawn if drawn != sorted(drawn) else reversed(drawn))

    identity = Ranking.identity(shape)
    return Ranking(
        hidden=order(shape.hidden),
        ffn=tuple(order(len(layer)) for layer in identity.ffn),
        mamba_heads=tuple(tuple(order(len(group)) for group in layer) for layer in identity.mamba_heads),
        mamba_channels=tuple(order(shape.head_channels) for _ in identity.mamba_channels),
        attention_heads=tuple(tuple(order(len(group)) for group in layer) for layer in identity.attention_heads),
        depth=identity.depth,
    )


SUBNETS = {
    "every axis": {
        "hidden": 20,
        "ffn": (24, 48, 8),
        "mamba_heads": (4, 4, 4),
        "head_channels": 3,
        "attention_heads": (2, 4),
        "kept_layers": (0, 1, 3, 4, 5, 6),
    },
    "hidden": {"hidden": 13},
    "ffn, each layer its own": {"ffn": (4, 48, 20)},
    "query heads, each layer its own": {"attention_heads": (2, 6)},
    "mamba heads and channels": {"mamba_heads": (2, 2, 2), "head_channels": 4},
    "depth": {"kept_layers": (2, 3, 5)},
}


@pytest.mark.parametrize("name", SUBNETS)
def test_pitfall_01_20_masked_parent_is_the_sliced_submodel(name: str) -> None:
    parent = tiny("M-*M*-M-")
    subnet = Subnet(**(vars(Subnet.full(parent)) | SUBNETS[name]))
    model = stock_model(parent)
    tensors = dict(from_hf(model.state_dict(), parent))
    submodel = subnet.shape(parent)
    sliced = stock_model_of(submodel_tensors(tensors, parent, subnet, LANES), submodel)
    full = logits(model, TOKENS)
    mask_by_hand(model, parent, subnet)
    masked = logits(model, TOKENS)
    assert relative_error(logits(sliced, TOKENS), masked) < 1e-5
    assert relative_error(masked, full) > 1e-2, "the mask changes nothing"


def mask_by_hand(model: PreTrainedModel, parent: ModelShape, subnet: Subnet) -> None:
    """Turn a stock parent into a subnet by zeroing weights; nothing here uses the nested layout's code.

    A norm over fewer active channels is x / sqrt(sum / kept + eps): the full norm with eps * kept / full and its
    weight times sqrt(kept / full).
    """
    with torch.no_grad():
        model.model.embeddings.weight[:, subnet.hidden :] = 0
        narrow_norm(model.model.norm_f, subnet.hidden, parent.hidden)
        for layer_index, layer in enumerate(model.model.layers):
            narrow_norm(layer.norm, subnet.hidden, parent.hidden)
            mixer, kind = layer.mixer, parent.pattern.kinds[layer_index]
            width = subnet.width(parent, layer_index)
            output = {LayerKind.MAMBA: "out_proj", LayerKind.ATTENTION: "o_proj", LayerKind.MLP: "down_proj"}[kind]
            weight = mixer.get_submodule(output).weight
            if layer_index not in subnet.kept_layers:
                weight.zero_()
            weight[subnet.hidden :] = 0
            if kind is LayerKind.MLP:
                lane = parent.width(layer_index) // LANES
                for neuron in range(parent.width(layer_index)):
                    if neuron % lane >= width // LANES:
                        mixer.up_proj.weight[neuron] = 0
            elif kind is LayerKind.ATTENTION:
                per_group = parent.width(layer_index) // parent.kv_heads
                for head in range(parent.width(layer_index)):
                    if head % per_group >= width // parent.kv_heads:
                        weight.view(parent.hidden, -1, parent.attention_channels)[:, head] = 0
            else:
                mask_mamba(mixer, parent, subnet, width)


def mask_mamba(mixer: torch.nn.Module, parent: ModelShape, subnet: Subnet, heads: int) -> None:
    per_group, channels = parent.mamba_heads[0] // parent.mamba_groups, parent.head_channels
    gate = mixer.in_proj.weight[: parent.mamba_heads[0] * channels].view(-1, channels, parent.hidden)
    for head in range(parent.mamba_heads[0]):
        kept = subnet.head_channels if head % per_group < heads // parent.mamba_groups else 0
        gate[head, kept:] = 0  # silu(0) = 0 takes the channel out of the norm and of the output
    active = heads // parent.mamba_groups * subnet.head_channels
    narrow_norm(mixer.norm, active, per_group * channels)


def narrow_norm(norm: torch.nn.Module, kept: int, full: int) -> None:
    norm.variance_epsilon *= kept / full
    norm.weight *= math.sqrt(kept / full)


def test_padding_is_undone_bit_for_bit() -> None:
    shape = replace(tiny("-*-*-M"), ffn=(8, 48, 20), attention_heads=(2, 6))
    tensors = {name: torch.randn(parameter_size(name, shape)) for name in parameter_names(shape)}
    stored = dict(to_hf(tensors, shape))
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == hf_sizes(shape)
    assert stored["backbone.layers.0.mixer.up_proj.weight"].shape[0] == 48
    assert identical(dict(from_hf(stored, shape)), tensors)
    stored["backbone.layers.0.mixer.up_proj.weight"][47, 3] = 1e-3
    with pytest.raises(HfTensorError, match=r"layers\.0\.mlp\.linear_fc1.*beyond width 8 is not zero"):
        dict(from_hf(stored, shape))


def test_mamba_widths_that_differ_are_refused_with_the_remedy() -> None:
    shape = replace(tiny("M-M"), mamba_heads=(8, 4))
    with pytest.raises(ExportError, match=r"layer 0: 8, layer 2: 4.*homogeneous mamba_head axis"):
        to_hf({}, shape)


def test_wrong_tensors_are_named() -> None:
    shape = SHAPES["no attention, long convolution"]
    state = file_names(dict(stock_model(shape).state_dict()))
    with pytest.raises(HfTensorError, match=r"backbone\.norm_f\.weight is \(3,\), the config says \(32,\)"):
        dict(from_hf(state | {"backbone.norm_f.weight": torch.zeros(3)}, shape))
    with pytest.raises(ValueError, match=r"decoder\.final_norm\.weight is \(3,\), expected \(32,\)"):
        dict(to_hf(dict(from_hf(state, shape)) | {"decoder.final_norm.weight": torch.zeros(3)}, shape))


def test_a_tied_head_is_stored_because_stock_code_does_not_tie_it() -> None:
    shape = SHAPES["groups 2, tied head"]
    state = dict(stock_model(shape).state_dict())
    ours = dict(from_hf(state, shape))
    assert "output_layer.weight" not in ours
    assert torch.equal(dict(to_hf(ours, shape))["lm_head.weight"], ours["embedding.word_embeddings.weight"])
    without_head = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    assert identical(dict(from_hf(without_head, shape)), ours)
    with pytest.raises(HfTensorError, match="set tie_word_embeddings to false"):
        dict(from_hf(state | {"lm_head.weight": state["lm_head.weight"] + 1}, shape))
