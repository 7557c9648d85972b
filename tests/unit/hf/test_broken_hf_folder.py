"""Every way a stock folder can be broken has its own message, and none is an unexpected error or a wait."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.hf.folder import HfFolder, HfFolderError, open_hf_folder
from elastic.hf.tensor_index import INDEX_FILE, SINGLE_FILE
from tests.unit.hf.hf_folders import (
    SHARD,
    TOKENIZER,
    append,
    cast,
    change_config,
    change_header,
    change_index,
    change_tensors,
    config_text,
    duplicate_in_header,
    first,
    good_folder,
    link_to_itself,
    link_to_nothing,
    load,
    model_names,
    only_pickles,
    point_to,
    put,
    put_into_another_shard,
    replace_by_folder,
    replace_by_pipe,
    replace_config_by_pipe,
    shift_offsets,
    truncate,
    write,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "model is not a folder"),
    "a file for a folder": (lambda folder: (shutil.rmtree(folder), put(folder, b"")), "model is not a folder"),
    "an empty folder": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        r"config\.json is missing from(.|\n)*neither model\.safetensors nor",
    ),
    # Repositories cloned without their large files.
    "a shard is a pointer": (
        lambda folder: put(folder / SHARD, POINTER),
        f"{SHARD} is a Git LFS pointer.*lfs pull",
    ),
    "tokenizer is a pointer": (lambda folder: put(folder / "tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS"),
    # config.json
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing from"),
    "config is a list": (config_text("[]"), r"config\.json must hold a JSON object, it holds a list"),
    "config is no JSON": (config_text("{'a': 1}"), r"config\.json cannot be read as JSON"),
    "config is not UTF-8": (config_text(b'{"a": "\xff"}'), r"config\.json is not UTF-8 text: .* at byte 7"),
    "config with a key twice": (config_text('{"hidden_size": 1, "hidden_size": 2}'), "same key twice hidden_size"),
    "config is huge": (config_text("{" + " " * 1_000_001 + "}"), r"config\.json is larger than 1,000,000 bytes"),
    "config is deep": (config_text('{"a":' + "[" * 90_000 + "]" * 90_000 + "}"), r"config\.json is nested too deeply"),
    "config is rather deep": (config_text('{"a":' + "[" * 50 + "]" * 50 + "}"), "a: nested more than 32 levels"),
    "config is a pipe": (replace_config_by_pipe, r"config\.json is a pipe, socket or device, not a regular file"),
    "half a character": (config_text('{"a": "\\ud800"}'), "a: text holds half a character"),
    "a size is NaN": (change_config(hidden_size=float("nan")), "hidden_size: numbers must be finite"),
    "a size is infinite": (change_config(hidden_size=float("inf")), "hidden_size: numbers must be finite"),
    "a size has too many digits": (config_text('{"hidden_size": ' + "9" * 5000 + "}"), "cannot be read as JSON"),
    "a size is absurd": (change_config(hidden_size=2**60), "hidden_size is 1152921504606846976, larger than any"),
    "a size is negative": (change_config(n_groups=-2), "n_groups is -2, it must be one integer of at least 1"),
    "a size is a truth": (change_config(conv_kernel=True), "conv_kernel is True, it must be one integer"),
    "a size is a float": (change_config(hidden_size=8.0), r"hidden_size is 8\.0, it must be one integer"),
    "a size is text": (change_config(hidden_size="8"), "hidden_size is '8', it must be one integer"),
    "another model": (change_config(model_type="llama"), "model_type = 'llama' must be 'nemotron_h'"),
    "too many layers": (
        change_config(hybrid_override_pattern="M" * 100_000, num_hidden_layers=100_000),
        "100,000 layers, more than any model's",
    ),
    "experts": (change_config(hybrid_override_pattern="ME*"), "layers 1 .*Mixture-of-experts.*use a dense parent"),
    "an unknown layer": (change_config(hybrid_override_pattern="MX*"), "character 'X' at position 1"),
    "multi-token layers": (change_config(num_nextn_predict_layers=1), "num_nextn_predict_layers = 1: multi-token"),
    "a quantised config": (change_config(quantization_config={}), "quantization_config is set, .*dequantise"),
    # generation config and tokenizer
    "generation config is a list": (lambda folder: write(folder / "generation_config.json", []), "generation_config"),
    "an end token beyond the vocabulary": (
        lambda folder: write(folder / "generation_config.json", {"eos_token_id": [2, 16]}),
        r"generation_config\.json: eos_token_id = \[2, 16\] is outside the vocabulary of 16",
    ),
    "a tokenizer too large": (
        lambda folder: write(folder / "tokenizer.json", TOKENIZER | {"added_tokens": [{"id": 16}]}),
        "has token 16, the model's vocabulary is 16",
    ),
    "a tokenizer that is none": (
        lambda folder: write(folder / "tokenizer.json", {"model": {"vocab": {"a": "b"}}}),
        r"tokenizer\.json is not a tokenizer's",
    ),
    # index
    "index is no JSON": (lambda folder: put(folder / INDEX_FILE, b"{"), "index.json is not a valid index"),
    "index without a map": (change_index(lambda index: {"metadata": {}}), "has no weight_map from tensors to files"),
    "index with a list for a map": (change_index(lambda index: {"weight_map": []}), "has no weight_map"),
    "index names nothing": (change_index(lambda index: {"weight_map": {}}), "names no tensors"),
    "path above": (point_to(f"../model/{SHARD}"), "points to '../model/.*' for lm_head.weight; only safetensors files"),
    "absolute path": (point_to(f"/etc/{SHARD}"), "points to '/etc/.*; only safetensors files beside it are read"),
    "path with a backslash": (point_to(f"..\\{SHARD}"), r"points to '\.\.\\.*only safetensors files beside it"),
    "path with a NUL": (point_to(f"{SHARD}\0.safetensors"), r"points to .*\\x00.*only safetensors files beside it"),
    "path that is empty": (point_to(""), "points to '' for lm_head.weight"),
    "path that is no text": (point_to(["a.safetensors"]), r"points to \['a.safetensors'\] for lm_head.weight"),
    "path to a pickle": (point_to("pytorch_model.bin"), "points to 'pytorch_model.bin'"),
    "path that is too long": (point_to("a" * 300 + ".safetensors"), "cannot be opened: File name too long|is missing"),
    "index key without a tensor": (
        change_index(lambda index: index["weight_map"].update({"lm_head.weight": SHARD})),
        rf"{SHARD} disagree about: lm_head\.weight; the index says the file holds it",
    ),
    "tensor without an index key": (
        change_index(lambda index: index["weight_map"].pop("lm_head.weight") and None),
        "disagree about: lm_head.weight; the file holds it, the index does not name it",
    ),
    "the index is missing": (lambda folder: (folder / INDEX_FILE).unlink(), "3 shards are there .*copy the index"),
    "one file and an index": (
        lambda folder: shutil.copy(folder / SHARD, folder / SINGLE_FILE),
        f"holds both {SINGLE_FILE} and {INDEX_FILE}",
    ),
    "only pickles": (only_pickles, "pytorch_model.bin is a pickle, which can run code when loaded; convert it"),
    # shards
    "a shard is missing": (lambda folder: (folder / SHARD).unlink(), rf"shard {SHARD} is missing from .*\(\d+ tensors"),
    "a shard is truncated": (truncate(SHARD, -3), rf"{SHARD} is truncated: ([\d,]+) bytes are there, .* promises"),
    "a shard ends in its header": (
        truncate(SHARD, 100),
        f"{SHARD} is truncated: 100 bytes are there, its header",
    ),
    "a shard ends before its header": (truncate(SHARD, 5), "5 bytes are too few for a safetensors file"),
    "a shard is empty": (truncate(SHARD, 0), "0 bytes are too few for a safetensors file"),
    "a shard is too long": (append(SHARD, b"x"), "but its header describes only"),
    "a shard is a folder": (replace_by_folder, f"{SHARD} is a folder, not a regular file"),
    "a shard is a pipe": (replace_by_pipe, f"{SHARD} is a pipe, socket or device, not a regular file"),
    "a shard is a broken link": (link_to_nothing, f"{SHARD} is a link to a file that is not there"),
    "a shard is a link to itself": (link_to_itself, f"{SHARD} cannot be opened: Too many levels of symbolic links"),
    "a tensor in two shards": (put_into_another_shard, "is stored twice, in model-00001.* and model-00002"),
    # headers
    "an absurd header length": (
        lambda folder: put(folder / SHARD, b"\xff" * 8 + (folder / SHARD).read_bytes()[8:]),
        f"{SHARD} is not a safetensors file, or damaged: it announces a header of 18,446,744,073,709,551,615 bytes",
    ),
    "a header that is no object": (change_header(lambda header: b"[1, 2]"), "must hold a JSON object"),
    "a header that is not UTF-8": (change_header(lambda header: b'{"\xff": 1}'), "is not UTF-8 text"),
    "a header with a name twice": (duplicate_in_header, "same key twice a"),
    "an unknown type": (change_header(lambda header: first(header).update(dtype="F5")), "has the unknown type F5"),
    "a shape that is negative": (change_header(lambda header: first(header).update(shape=[-1])), r"has shape \[-1\]"),
    "a shape that is not the bytes": (change_header(lambda header: first(header).update(shape=[7])), "takes 14"),
    "tensors with a hole": (change_header(shift_offsets), "leaves a hole behind the header, which ends at 0"),
    "tensors that overlap": (
        change_header(lambda header: header.update(more=first(header))),
        "is damaged: more begins at 0, it overlaps|, it overlaps more, which",
    ),
    # tensors against the config
    "a tensor missing": (
        change_tensors(lambda tensors: tensors.pop("backbone.norm_f.weight")),
        r"1 tensors of the config are missing: backbone\.norm_f\.weight",
    ),
    "a tensor too many": (
        change_tensors(lambda tensors: tensors.update(surplus=torch.zeros(1))),
        "1 unexpected tensors, which the config does not describe: surplus",
    ),
    "a tensor of experts": (
        change_tensors(lambda tensors: tensors.update({"backbone.layers.1.mixer.gate.weight": torch.zeros(1)})),
        "1 unexpected tensors belong to mixture of experts.*dense parent: backbone.layers.1.mixer.gate.weight",
    ),
    "a multi-token tensor": (
        change_tensors(lambda tensors: tensors.update({"mtp.layers.0.norm.weight": torch.zeros(1)})),
        "belong to multi-token prediction, which is not supported; save the model without it: mtp",
    ),
    "a tensor of a wrong shape": (
        change_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(16, 9).bfloat16()})),
        r"lm_head\.weight is \(16, 9\), the config says \(16, 8\)",
    ),
    "a tensor transposed": (
        change_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(8, 16).bfloat16()})),
        r"lm_head\.weight is \(8, 16\), the config says \(16, 8\)",
    ),
    "two names for a tensor": (change_tensors(model_names), "stored twice, under a name with model. and one"),
    # number formats
    "half precision": (cast(torch.float16, "weight"), r"tensors are F16 .*load the model with dtype=torch\.float32"),
    "eight bits": (
        cast(torch.float8_e4m3fn, "in_proj.weight"),
        "F8_E4M3 .*is quantised; dequantise the folder",
    ),
    "integers": (cast(torch.int8, "up_proj.weight"), "1 tensors are I8 .*dequantise"),
    "double precision": (
        cast(torch.float64, "up_proj.weight"),
        "F64 .*is not supported; save the model in F32",
    ),
    "one matrix in fp32": (cast(torch.float32, "up_proj.weight"), "matrices have two number formats .*up_proj"),
    "one layer's norm in fp32": (
        cast(torch.float32, "1.norm.weight"),
        "norm.weight is F32 in some layers, BF16 in",
    ),
    "a bf16 norm beside fp32": (
        cast(torch.float32, "j.weight", "s.weight", "head.weight", "conv1d.weight"),
        "is BF16 beside matrices in F32",
    ),
}


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", BROKEN)
def test_every_broken_folder_has_its_own_message(how: str, tmp_path: Path) -> None:
    breaking, message = BROKEN[how]
    folder = good_folder(tmp_path / "model")
    breaking(folder)
    before = contents(tmp_path)
    with pytest.raises(HfFolderError, match=message) as caught:
        open_hf_folder(folder)
    assert str(folder) in str(caught.value) and str(caught.value).isprintable() is False  # several lines
    assert all(len(problem) < 700 and problem.isprintable() for problem in caught.value.problems)
    assert contents(tmp_path) == before, "opening wrote something"


def damage(content: bytes, draw: random.Random) -> bytes:
    """Cut, flip, delete or repeat a few bytes, most of them near the beginning, where headers are."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(min(len(changed), draw.choice((12, 300, 10**6)))) if changed else 0
        match draw.randrange(5):
            case 0:
                changed[place:] = b""
            case 1:
                changed[place : place + 1] = bytes([draw.randrange(256)])
            case 2:
                changed[place : place + 1] = draw.choice((b"0", b"9", b"-", b'"', b"[", b"{", b"e", b"\\", b"1e999"))
            case 3:
                changed[place : place + draw.randrange(9)] = b""
            case 4:
                changed[place:place] = changed[place : place + draw.randrange(40)]
    return bytes(changed)


def complete(opened: HfFolder) -> bool:
    """Tell whether the library agrees that every file is sound, and what it reads is what was announced."""
    files = {path.name: path for path in opened.path.glob("*.safetensors")}
    read = {name: tensor for path in files.values() for name, tensor in load(path)}
    return all(
        torch.equal(opened.tensors[name].nan_to_num(), read[name].nan_to_num())
        and read[name].dtype == opened.exports.dtypes.of(name)
        for name in opened.tensors
    )


@pytest.mark.timeout(60)
def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Whatever the bytes are: a checked folder or an error of ours; where we see none, the library sees none."""
    folder, draw = good_folder(tmp_path / "model"), random.Random(7)
    names = ["config.json", INDEX_FILE, SHARD, "generation_config.json", "tokenizer.json"]
    originals = {name: (folder / name).read_bytes() for name in names}
    outcomes = {True: 0, False: 0}
    for _ in range(200):
        name = draw.choice(names)
        put(folder / name, damage(originals[name], draw))
        try:
            assert complete(open_hf_folder(folder))
            outcomes[True] += 1
        except HfFolderError:
            outcomes[False] += 1
        put(folder / name, originals[name])
    assert min(outcomes.values()) > 10, outcomes
