"""Exports in FP8: codes and scales of a submodel are its parent's, read back by us and by stock transformers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elastic.hf.folder import open_hf_folder
from elastic.verbs.extract import EXTRACTION_FILE
from tests.parity.hf_models import SHAPES
from tests.parity.import_extract import extracted, imported, narrowed, stock_folder, weights

SHAPE = SHAPES["groups 8, twelve layers"]
NARROW = narrowed(SHAPE)  # hidden 24, ffn 24, 8 heads of 3 channels, 4 query heads, without the last layer
MATRICES = {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_quantised(name: str) -> bool:
    return "layers" in name and name.split(".")[-2] in MATRICES


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent and a narrow subnet of it in FP8, read back and compared value by value, made of a plain folder."""
    folder = tmp_path_factory.mktemp("fp8")
    stock_folder(folder / "stock", SHAPE, "fp32")
    run, export = imported(folder, folder / "stock"), {"format": "fp8", "check": "values"}
    return extracted(folder, run, "fp8", subnets=[NARROW], export=export)


def test_matrices_of_the_layers_are_codes_with_a_scale_per_row_and_the_rest_is_not(exports: Path) -> None:
    """Against torch's own rounding of the plain weights."""
    plain, found = weights(exports.parent.parent / "stock"), stored(exports / "parent")
    quantised = set(filter(is_quantised, plain))
    assert len(quantised) == 5 * 2 + 5 * 2 + 2 * 4
    assert found.keys() == plain.keys() | {f"{name}_scale" for name in quantised}
    for name, tensor in plain.items():
        if name in quantised:
            scales = tensor.abs().amax(1, keepdim=True) / 448
            assert torch.equal(found[f"{name}_scale"], scales) and found[name].dtype is torch.float8_e4m3fn
            assert torch.equal(found[name].float(), (tensor / scales).to(torch.float8_e4m3fn).float())
        else:
            assert torch.equal(found[name], tensor if name.endswith(("A_log", ".D")) else tensor.bfloat16()), name
    config = json.loads((exports / "parent" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized" and config["ignore"] == ["lm_head"]
    card = (exports / "parent" / "README.md").read_text()
    assert "bfloat16, matrices of the layers in FP8" in card and "The loss this costs was not measured." in card
    taken = sum(tensor.nbytes for tensor in found.values()) / 2**20
    assert f"| weights as stored (bfloat16, matrices of the layers in FP8) | {taken:.2f} MiB |" in card
    assert "these are none" not in card
    assert "multiples of 16; these are none: in_proj 184 x 24, " in (exports / "narrow" / "README.md").read_text()


def kept(name: str) -> tuple[Tensor, Tensor]:
    """Return the parent's rows and columns that the narrow subnet keeps of a matrix, written out."""
    hidden, ffn, heads = torch.arange(24), torch.arange(24), torch.arange(0, 16, 2)  # the first head of each group
    inner, queries = (heads.unsqueeze(1) * 4 + torch.arange(3)).flatten(), torch.tensor([0, 1, 3, 4])  # 2 of 3 a group
    context, keys = (queries.unsqueeze(1) * 8 + torch.arange(8)).flatten(), torch.arange(16)
    in_proj = torch.cat([inner, 64 + inner, 128 + torch.arange(128), 256 + heads])  # z, x, B and C, dt
    rows_and_columns = {"in_proj": (in_proj, hidden), "out_proj": (hidden, inner), "up_proj": (ffn, hidden)}
    rows_and_columns |= {"down_proj": (hidden, ffn), "q_proj": (context, hidden), "o_proj": (hidden, context)}
    return (rows_and_columns | {"k_proj": (keys, hidden), "v_proj": (keys, hidden)})[name]


def test_scales_and_codes_of_a_submodel_are_a_part_of_its_parents(exports: Path) -> None:
    parent, narrow = stored(exports / "parent"), stored(exports / "narrow")
    seen, below = set(), 0
    for name in filter(is_quantised, narrow):
        if name.endswith("_scale"):
            continue
        kind = name.split(".")[-2]
        rows, columns = kept(kind)
        assert torch.equal(narrow[f"{name}_scale"], parent[f"{name}_scale"][rows]), name
        assert torch.equal(narrow[name].float(), parent[name].float()[rows][:, columns]), name
        seen.add(kind)
        below += int((narrow[name].float().abs().amax(1) < 448).sum())
    assert seen == MATRICES
    assert below > 0, "no row's largest weight was cut away, so scales of the slice alone would be the same"


def test_a_folder_in_fp8_comes_back_as_the_numbers_of_its_codes(exports: Path, tmp_path: Path) -> None:
    codes = stored(exports / "narrow")
    opened = open_hf_folder(exports / "narrow")
    assert any("they are dequantised" in text for text in opened.warnings)
    back = weights(extracted(tmp_path, imported(tmp_path, exports / "narrow")) / "parent")
    assert back.keys() == set(opened.tensors)
    for name, tensor in back.items():
        expected = codes[name].float() * codes[f"{name}_scale"] if is_quantised(name) else codes[name]
        assert torch.equal(opened.tensors[name], expected) and torch.equal(tensor, expected.to(tensor.dtype)), name
        assert tensor.dtype is codes[name].dtype or (is_quantised(name) and tensor.dtype is torch.bfloat16)


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="stock transformers reads FP8 with the package compressed-tensors: pip install 'compressed-tensors>=0.15'",
)
def test_stock_transformers_runs_it_with_the_subnets_logits(exports: Path, tmp_path: Path) -> None:
    run = exports.parent.parent / "imported" / "v"
    folder = extracted(tmp_path, run, "stock", subnets=[NARROW], export={"format": "fp8", "check": "logits"})
    for row in json.loads((folder / EXTRACTION_FILE).read_text())["members"]:
        assert row["max_abs_logit_diff"] < 1e-4 and "logits of the reloaded folder" in row["verification"]
