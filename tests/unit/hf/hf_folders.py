"""A small stock Hugging Face folder, and the ways to break it."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from elastic.hf.config import hf_config
from elastic.hf.export_settings import DtypeRule, HfSettings
from elastic.hf.names import hf_sizes
from elastic.hf.tensor_files import planned, write_tensors
from elastic.hf.tensor_index import INDEX_FILE, SINGLE_FILE
from elastic.space.shape import ModelShape

SHAPE = ModelShape.uniform(
    "M-*",
    vocab=16,
    hidden=8,
    ffn=4,
    mamba_heads=4,
    head_channels=2,
    mamba_groups=2,
    mamba_state=3,
    conv_kernel=4,
    attention_heads=2,
    kv_heads=1,
    attention_channels=4,
)
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 14}}, "added_tokens": [{"id": 15}]}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6}
# How the published Nemotron Nano v2 says it; the sizes are the test's own.
PUBLISHED = {
    "auto_map": {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"},
    "rescale_prenorm_residual": True,
    "time_step_limit": [0.0, float("inf")],
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "transformers_version": "4.51.3",
    "use_mamba_kernels": True,
}
SHARD = "model-00002-of-00003.safetensors"


def good_folder(folder: Path, rule: DtypeRule | None = None, shard_bytes: int = 800, **config: Any) -> Path:
    """Write a sound folder in three shards, with tokenizer and generation config."""
    folder.mkdir(parents=True)
    rule = rule or DtypeRule(torch.bfloat16)
    plan = {name: planned(size, rule.of(name)) for name, size in hf_sizes(SHAPE).items()}
    values = ((name, torch.randn(tensor.shape)) for name, tensor in plan.items())
    write_tensors(folder, plan, values, shard_bytes)
    write(folder / "config.json", hf_config(SHAPE, HfSettings(), rule.main) | config)
    write(folder / "generation_config.json", GENERATION)
    write(folder / "tokenizer.json", TOKENIZER)
    write(folder / "tokenizer_config.json", {"model_max_length": 10})
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        write(folder / "config.json", config | changes)

    return change


def config_text(text: str | bytes) -> Callable[[Path], None]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: put(folder / "config.json", content)


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Apply `change` to the index; what it returns, if anything, takes its place."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        write(folder / INDEX_FILE, change(index) or index)

    return apply


def point_to(file: Any) -> Callable[[Path], None]:
    return change_index(lambda index: index["weight_map"].update({"lm_head.weight": file}))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any], listed: bool = True) -> Callable[[Path], None]:
    """Rewrite the whole folder's tensors as one file after `change`."""

    def apply(folder: Path) -> None:
        tensors = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load(path)}
        for path in folder.glob("model*"):
            path.unlink()
        change(tensors)
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})

    return apply


def load(path: Path) -> Any:
    return load_file(path).items()


def change_header(change: Callable[[dict[str, Any]], Any], path: str = SHARD) -> Callable[[Path], None]:
    """Rewrite a shard's header and leave its values alone."""

    def apply(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        changed = change(header) or header
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        put(folder / path, struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def cast(dtype: torch.dtype, *ends: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(ends):
                tensors[name] = tensors[name].to(dtype)

    return change_tensors(change)


def replace_by_folder(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


def replace_by_pipe(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def replace_config_by_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def link_to_nothing(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("../../blobs/0123")


def link_to_itself(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(SHARD)


def put_into_another_shard(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file(dict(tensors) | dict(load_file(folder / SHARD.replace("2", "1", 1))), folder / SHARD)


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    put(folder / "pytorch_model.bin", b"\x80\x04")


def duplicate_in_header(folder: Path) -> None:
    change_header(lambda header: ("{" + ",".join(f'"a":{json.dumps(first(header))}' for _ in range(2)) + "}").encode())(
        folder
    )


def append(path: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: put(folder / path, (folder / path).read_bytes() + content)


def truncate(path: str, num_bytes: int) -> Callable[[Path], None]:
    return lambda folder: put(folder / path, (folder / path).read_bytes()[:num_bytes])


def shift_offsets(header: dict[str, Any]) -> None:
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 2 for offset in entry["data_offsets"]]


def model_names(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm_f.weight"] = tensors["backbone.norm_f.weight"].clone()
