"""Folders in FP8 that others wrote: scales of a matrix, of its rows and of blocks; what is refused, and why."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastic.hf.folder import HfFolderError, open_hf_folder
from tests.unit.hf.hf_folders import change_config, change_tensors, good_folder, load

MATRICES = ("in_proj", "out_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
Tensors = dict[str, Tensor]


def row(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    scales = torch.rand(rows, 1) + 0.5
    return scales, scales.expand(rows, columns)


def flat_row(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    scales, spread = row(rows, columns)
    return scales.flatten().bfloat16(), spread.bfloat16().float()


def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(0.75), torch.full((rows, columns), 0.75)


def block(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of 3 rows and 5 columns, the last of each not whole, placed one by one."""
    scales = torch.rand(-(-rows // 3), -(-columns // 5)) + 0.5
    spread = torch.stack([torch.stack([scales[r // 3, c // 5] for c in range(columns)]) for r in range(rows)])
    return scales, spread


# Who writes so: config, name of the scales, the scales and what they multiply.
WRITERS: dict[str, tuple[dict, str, Callable[[int, int], tuple[Tensor, Tensor]]]] = {
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "_scale", row),
    "rows in bf16": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense", "global_sparsity": 0.1}},
        "_scale",
        flat_row,
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale", matrix),
    "fine-grained": ({"quant_method": "fp8", "weight_block_size": [3, 5]}, "_scale_inv", block),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_numbers_are_the_codes_times_their_scales(writer: str, tmp_path: Path) -> None:
    config, ending, scaled = WRITERS[writer]
    folder, expected = good_folder(tmp_path / "model"), {}

    def quantise(tensors: Tensors) -> None:
        torch.manual_seed(0)
        for name in [name for name in tensors if name.split(".")[-2] in MATRICES]:
            codes = tensors[name].to(torch.float8_e4m3fn)
            scales, spread = scaled(*codes.shape)
            tensors[name], expected[name] = codes, codes.float() * spread
            tensors[f"{name}{ending}"] = scales.contiguous()
            if writer == "modelopt":
                tensors[name.replace(".weight", ".input_scale")] = torch.tensor(1.0)

    change_tensors(quantise)(folder)
    change_config(quantization_config=config)(folder)
    opened, plain = open_hf_folder(folder), dict(load(folder / "model.safetensors"))
    assert len(expected) == 8 and set(opened.tensors) == {name for name in plain if "_scale" not in name}
    for name in opened.tensors:
        assert torch.equal(opened.tensors[name], expected.get(name, plain[name])), name
    assert opened.exports.dtypes.main is torch.bfloat16
    assert any("8 matrices are in FP8: they are dequantised" in text for text in opened.warnings)
    assert any("activations are not kept" in text for text in opened.warnings) == (writer == "modelopt")


def first_matrix(tensors: Tensors) -> str:
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    return name


def with_scales(*scales: Tensor) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        name = first_matrix(tensors)
        tensors |= {f"{name}{ending}": scale for ending, scale in zip(("_scale", "_scale_inv"), scales, strict=False)}

    return change_tensors(change)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scales": (with_scales(), r"F8_E4M3 .*up_proj\.weight.*is quantised; dequantise the folder"),
    "three scales": (with_scales(torch.ones(3)), r"scales are F32 \(3,\): none for the matrix, its rows or its blocks"),
    "scales of 8 bits": (
        with_scales(torch.ones(4, 1).to(torch.float8_e4m3fn)),
        "scales are F8_E4M3 .*dequantise the folder first",
    ),
    "two sets": (with_scales(torch.ones(4), torch.ones(4)), "has two sets of scales"),
    "NVFP4, by its config": (
        change_config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        "the folder is in NVFP4: .*take the same model's folder in BF16",
    ),
    "NVFP4, by its tensors": (
        change_tensors(lambda tensors: tensors.update({"a.weight_global_scale": torch.zeros(1)})),
        "the folder is in NVFP4: .*or dequantise it with the tool that wrote it",
    ),
    "another method": (
        change_config(quantization_config={"quant_method": "awq"}),
        "quantization_config is set, by awq: only FP8 is read .*dequantise it",
    ),
    "no method but a text": (
        lambda folder: (with_scales(torch.ones(4))(folder), change_config(quantization_config="x")(folder)),
        "quantization_config is set, by x",
    ),
    "thinned out": (
        change_config(
            quantization_config={
                "quant_method": "compressed-tensors",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            }
        ),
        "transforms or thins out the weights: dequantise",
    ),
    "rotated": (
        change_config(quantization_config={"quant_method": "compressed-tensors", "transform_config": {"a": 1}}),
        "transforms or thins out the weights: dequantise",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_not_plain_fp8_is_refused(how: str, tmp_path: Path) -> None:
    breaking, message = REFUSED[how]
    folder = good_folder(tmp_path / "model")
    breaking(folder)
    with pytest.raises(HfFolderError, match=message) as caught:
        open_hf_folder(folder)
    if how.startswith("NVFP4"):
        assert len(caught.value.problems) == 1, "what else does not fit says nothing new"
