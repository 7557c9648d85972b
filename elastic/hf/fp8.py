"""FP8 (E4M3) in folders: scales of a submodel's matrices, cut from its nested parent's, and what others wrote, back.

Written is what vLLM and transformers both read, compressed-tensors' `float-quantized`: the matrices inside the layers
in E4M3 with a scale per output row, activations rounded per token where an engine has FP8 products. Embedding, head,
norms and convolution stay as they are, and so do A_log, D and dt_bias; dt's rows are a part of in_proj, which is one
tensor in this layout, and have scales of their own. Scales are the parent's, over its whole input width: a submodel's
are a part of them, and so are its codes, whatever is cut.

Shapes: R rows and C columns of a matrix.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from elastic.hf.config import export_shape
from elastic.hf.names import hf_names, hf_sizes, pad_rows, split_qkv
from elastic.hf.safe_files import listed, shown
from elastic.hf.tensor_index import StoredTensor
from elastic.model.quantised import E4M3, quantise, row_scales
from elastic.rank.slicing import TensorSource, parent_parameter, reader
from elastic.space.layers import FP8_MULTIPLE, parameter_dims, parameter_names, split_parameter_name
from elastic.space.nesting import Cut, take
from elastic.space.shape import ModelShape, Subnet

_E4M3_NAME, _WEIGHT = "F8_E4M3", ".weight"
_SYMMETRIC = {"num_bits": 8, "type": "float", "symmetric": True}
QUANTISATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_SYMMETRIC, "strategy": "channel", "dynamic": False},
            "input_activations": {**_SYMMETRIC, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def is_quantised(name: str) -> bool:
    """Tell whether a Megatron-Core parameter is a matrix inside a layer."""
    return split_parameter_name(name)[0] is not None and len(parameter_dims(name)) == 2


def calibrate(source: TensorSource, parent: ModelShape) -> dict[str, Tensor]:
    """Return the scales [R, 1] of every matrix of a nested parent, by name: once for all submodels."""
    read = reader(source)
    return {name: row_scales(read(name)) for name in parameter_names(parent) if is_quantised(name)}


def cut_scales(calibrated: Mapping[str, Tensor], parent: ModelShape, subnet: Subnet, lanes: int) -> dict[str, Tensor]:
    """Return the scales of a submodel's matrices by its own names: rows of the parent's, whatever columns are cut."""
    found = {}
    for name in filter(is_quantised, parameter_names(subnet.shape(parent))):
        parent_name, (kind, _) = parent_parameter(name, subnet), parameter_dims(name)
        layer_index, _ = split_parameter_name(parent_name)
        cut = Cut.of_layer(parent, layer_index, subnet.layer_widths(parent, layer_index), lanes=lanes)
        found[name] = take(calibrated[parent_name], 0, cut.grid(kind))
    return found


def hf_scales(scales: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Return the scales as a folder has them, by Hugging Face name: padded and split as `to_hf` does their rows."""
    padded, found = export_shape(shape), dict[str, Tensor]()
    for name, rows in scales.items():
        names, whole = hf_names(name), pad_rows(rows, name, shape, padded)
        parts = split_qkv(whole, padded.kv_heads, padded.attention_channels) if len(names) == 3 else (whole,)
        # A row of the padding is all zeros: any scale will do but none.
        found |= {hf: torch.where(part > 0, part, 1.0) for hf, part in zip(names, parts, strict=True)}
    return found


def odd_sizes(shape: ModelShape) -> list[str]:
    """List the matrices in FP8 whose rows or columns GPUs' FP8 products do not take, by kind and size."""
    names = [hf for name in filter(is_quantised, parameter_names(shape)) for hf in hf_names(name)]
    sizes = hf_sizes(shape)
    odd = {name: sizes[name] for name in names if any(size % FP8_MULTIPLE for size in sizes[name])}
    return list(dict.fromkeys(f"{name.split('.')[-2]} {rows} x {columns}" for name, (rows, columns) in odd.items()))


def scales_of(name: str) -> str:
    """Return the name of a weight's scales."""
    return f"{name}_scale"


def fp8_plan(plan: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a folder holds (tensor_files.planned), its matrices as codes and scales."""
    found = {name: tensor.to(E4M3) if name in scales else tensor for name, tensor in plan.items()}
    return found | {scales_of(name): scale.to("meta") for name, scale in scales.items()}


def fp8_tensors(tensors: Iterable[tuple[str, Tensor]], scales: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a folder's tensors, its matrices as codes and scales."""
    for name, tensor in tensors:
        if name not in scales:
            yield name, tensor
            continue
        yield name, quantise(tensor, scales[name]).values
        yield scales_of(name), scales[name]


def dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the numbers [R, C] that codes stand for, fp32; a scale serves `block` rows and columns."""
    scales = scales.float().reshape([-(-size // step) for size, step in zip(codes.shape, block, strict=True)])
    for dim, (size, step) in enumerate(zip(codes.shape, block, strict=True)):
        if step not in (1, size):
            scales = scales.repeat_interleave(step, dim).narrow(dim, 0, size)
    return codes.float() * scales


# What others write beside weights in FP8, and nothing here needs: scales of activations and of the attention's cache.
_ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale")
_METHODS = ("compressed-tensors", "fp8", "modelopt")
_NVFP4 = ("_scale_2", ".weight_global_scale")
NVFP4_REFUSED = (
    "the folder is in NVFP4: weights of 4 bits, which nothing can be trained or cut from; take the same model's folder "
    "in BF16 (or FP8, which is dequantised here), or dequantise it with the tool that wrote it"
)


def is_nvfp4(config: Mapping[str, Any] | None, names: Iterable[str]) -> bool:
    """Tell whether a config, or the names of a folder's tensors, speak of NVFP4."""
    said = json.dumps((config or {}).get("quantization_config")).lower()
    return "nvfp4" in said or any(name.endswith(_NVFP4) for name in names)


def quantisation_problem(config: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a config's `quantization_config`: FP8 is read, by what its tensors say."""
    told = config.get("quantization_config")
    if told is None:
        return None
    method = told.get("quant_method") if isinstance(told, dict) else told
    if not isinstance(told, dict) or method not in _METHODS:
        return f"quantization_config is set, by {shown(method)}: only FP8 is read ({listed(_METHODS)}); dequantise it"
    thinned = told.get("sparsity_config")
    is_dense = isinstance(thinned, dict) and thinned.get("format") == "dense"  # counts zeros, and stores them
    if told.get("transform_config") or (thinned and not is_dense):
        return "quantization_config transforms or thins out the weights: dequantise the folder to bf16 first"
    return None


def paired(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any] | None
) -> tuple[dict[str, StoredTensor], list[str], list[str]]:
    """Give matrices in FP8 their scales; returns what is left, problems, and warnings for the user.

    Scales multiply, whatever their name: `weight_scale` of a matrix, row or block, `weight_scale_inv` of a block.
    """
    left, problems = dict(stored), list[str]()
    coded = [name for name, tensor in stored.items() if tensor.dtype == _E4M3_NAME and len(tensor.size) == 2]
    for name in coded:
        found = [left.pop(scale) for scale in (scales_of(name), f"{name}_scale_inv") if scale in left]
        if len(found) > 1:
            problems.append(f"{shown(name)} has two sets of scales, {scales_of(name)} and {name}_scale_inv")
        elif found:
            block = _block(stored[name].size, found[0].size, config or {})
            if block is None or found[0].dtype not in ("F32", "BF16", "F16"):
                problems.append(
                    f"{shown(name)} is {shown(stored[name].size)} and its scales are {found[0].dtype} "
                    f"{shown(found[0].size)}: none for the matrix, its rows or its blocks; dequantise the folder first"
                )
            left[name] = replace(stored[name], scales=found[0], block=block or (1, 1))
    if not any(left[name].scales is not None for name in coded):
        return left, problems, []
    dropped = [name for name in left if name.endswith(_ACTIVATIONS)]
    warnings = [f"{len(coded)} matrices are in FP8: they are dequantised, and stay what they were rounded to"]
    warnings += [f"scales of activations are not kept: {listed(dropped)}"] if dropped else []
    return {name: tensor for name, tensor in left.items() if name not in dropped}, problems, warnings


def _block(size: tuple[int, ...], scales: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that one of a matrix's scales stands for; None if their number fits nothing."""
    rows, columns = size
    quantised = config.get("quantization_config")
    told = (quantised.get("weight_block_size") if isinstance(quantised, dict) else None) or [128, 128]
    if scales in ((), (1,), (1, 1)):
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    if isinstance(told, list) and len(told) == 2 and all(type(step) is int and step > 0 for step in told):
        if scales == (-(-rows // told[0]), -(-columns // told[1])):
            return told[0], told[1]
    return None
