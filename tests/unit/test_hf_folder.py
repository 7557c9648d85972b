"""Every way a stock folder can be broken has its own message, and none is an unexpected error or a wait."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic.compress.disk import DiskSpaceError, check_free_space
from elastic.compress.hf_carried import SETTINGS_FILE, Carried, CarriedError, read_carried, write_carried
from elastic.compress.hf_config import HfSettings, hf_config
from elastic.compress.hf_dtypes import DtypeError, DtypeRule
from elastic.compress.hf_folder import HfFolder, HfFolderError, open_hf_folder
from elastic.compress.hf_names import hf_sizes
from elastic.compress.tensor_files import TensorSpec, plan_shards, write_tensors
from elastic.compress.tensor_index import INDEX_FILE, SINGLE_FILE
from elastic.space.shape import ModelShape
from tests.shapes import NANO_12B

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
    specs = {name: TensorSpec(size, rule.of(name)) for name, size in hf_sizes(SHAPE).items()}
    values = ((name, torch.randn(spec.size)) for name, spec in specs.items())
    write_tensors(folder, specs, values, shard_bytes)
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


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "model is not a folder"),
    "a file for a folder": (lambda folder: (shutil.rmtree(folder), put(folder, b"")), "model is not a folder"),
    "an empty folder": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        r"config\.json is missing from(.|\n)*neither model\.safetensors nor",
    ),
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
    "a quantised config": (change_config(quantization_config={}), "quantization_config is set: .*dequantise"),
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
        "announces a header of 18,446,744,073,709,551,615 bytes, more than",
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


@pytest.mark.timeout(10)
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


def test_a_sound_folder_says_everything(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    opened = open_hf_folder(folder)
    assert (opened.shape, opened.generation, opened.warnings) == (SHAPE, GENERATION, ())
    assert opened.config == json.loads((folder / "config.json").read_text())
    assert [path.name for path in opened.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    assert opened.tensors.keys() == opened.dtypes.keys() == hf_sizes(SHAPE).keys()
    for path in folder.glob("*.safetensors"):
        for name, tensor in load(path):
            assert torch.equal(opened.tensors[name], tensor) and opened.dtypes[name] == tensor.dtype
    index = json.loads((folder / INDEX_FILE).read_text())
    assert opened.num_bytes == index["metadata"]["total_size"] > 0


def test_the_published_12b_opens_without_a_look_at_its_25_gigabytes(tmp_path: Path) -> None:
    """Shards of the real sizes, headers at their beginning and holes behind them."""
    specs = {name: TensorSpec(size, torch.bfloat16) for name, size in hf_sizes(NANO_12B).items()}
    weight_map = {}
    for number, shard in enumerate(plan_shards(specs, 5_000_000_000)):
        path, begin = tmp_path / f"{number}.safetensors", 0
        header: dict[str, Any] = {}
        for name, spec in shard.items():
            offsets = [begin, begin + spec.num_bytes]
            header[name] = {"dtype": "BF16", "shape": list(spec.size), "data_offsets": offsets}
            begin, weight_map[name] = offsets[1], path.name
        text = json.dumps(header).encode()
        put(path, struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + begin)
    write(tmp_path / INDEX_FILE, {"weight_map": weight_map})
    write(tmp_path / "config.json", hf_config(NANO_12B, HfSettings(), torch.bfloat16) | PUBLISHED)
    opened = open_hf_folder(tmp_path)
    assert (opened.shape, opened.num_bytes) == (NANO_12B, 2 * 12_310_001_152)
    assert len(set(weight_map.values())) > 4


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    change_config(use_bias=True)(folder)
    change_index(lambda index: index["weight_map"].update(evil="../evil.safetensors"))(folder)
    (folder / SHARD).unlink()
    truncate(SHARD.replace("2", "1", 1), -1)(folder)
    write(folder / "tokenizer.json", {"added_tokens": [{"id": "x"}]})
    with pytest.raises(HfFolderError) as caught:
        open_hf_folder(folder)
    for part in ("use_bias", "../evil", "00002-of-00003.safetensors is missing", "is truncated", "not a tokenizer's"):
        assert any(part in problem for problem in caught.value.problems)
    assert len(caught.value.problems) == 5


def test_a_published_config_opens_and_its_code_stays_where_it_is(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model", **PUBLISHED)
    assert "Infinity" in (folder / "config.json").read_text()
    for name in ("modeling_nemotron_h.py", "configuration_nemotron_h.py", "tokenization.py"):
        (folder / name).write_text("raise SystemExit('run')")
    write(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}})
    opened = open_hf_folder(folder)
    assert opened.shape == SHAPE
    assert opened.settings.carried == {"time_step_rank": 256, "use_mamba_kernels": True}
    warnings = " ".join(opened.warnings)
    for part in ("auto_map is ignored", "code is never run or copied: configuration_nemotron_h.py", "time_step_min"):
        assert part in warnings
    carried = write_carried(Carried.of(opened), tmp_path / "checkpoint")
    assert sorted(path.name for path in carried.iterdir()) == [SETTINGS_FILE, "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((carried / "tokenizer_config.json").read_text()) == {}


def test_links_as_in_the_hub_cache_work(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    opened = open_hf_folder(snapshot)
    assert opened.warnings == ()
    assert all(torch.isfinite(tensor).all() for tensor in opened.tensors.values())
    copied = write_carried(Carried.of(opened), tmp_path / "checkpoint")
    assert not any(path.is_symlink() for path in copied.iterdir())


def test_a_link_to_a_file_of_another_place_is_told(tmp_path: Path) -> None:
    """A folder that came in an archive could name any file of this machine as its template."""
    folder = good_folder(tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (folder / "chat_template.jinja").symlink_to("../secret")
    (folder / "merges.txt").symlink_to("tokenizer.json")
    (warning,) = open_hf_folder(folder).warnings
    assert "links to files outside the folder: chat_template.jinja; what" in warning


def test_what_can_be_ignored_is_only_warned_of(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model", torch_dtype="float32", my_key=1)
    change_index(lambda index: index["metadata"].update(total_size=1))(folder)
    put(folder / "consolidated.safetensors", b"")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    warnings = " ".join(open_hf_folder(folder).warnings)
    for part in (
        "total_size = 1, the shards hold",
        "not read, because no index names it: consolidated.safetensors",
        "torch_dtype = float32, but the tensors are bfloat16",
        "no tokenizer files",
        "not kept: my_key",
    ):
        assert part in warnings


def test_names_of_a_loaded_model_are_accepted(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("backbone.", "model.")] = tensors.pop(name)

    change_tensors(rename)(folder)
    assert open_hf_folder(folder).tensors["backbone.norm_f.weight"].shape == (8,)


RULES = {
    "all bf16": DtypeRule(torch.bfloat16),
    "all fp32": DtypeRule(torch.float32),
    "as trained": DtypeRule.trained(torch.bfloat16),
    "all vectors of a Mamba layer": DtypeRule(
        torch.bfloat16,
        dict.fromkeys(("mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.norm.weight", "norm.weight"), torch.float32),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_number_format_of_every_tensor_is_kept(name: str, tmp_path: Path) -> None:
    opened = open_hf_folder(good_folder(tmp_path / "model", RULES[name]))
    assert opened.dtype_rule == RULES[name]
    assert DtypeRule.from_json(json.loads(json.dumps(opened.dtype_rule.to_json()))) == RULES[name]
    assert all(opened.tensors[name].dtype == dtype for name, dtype in opened.dtypes.items())


def test_other_number_formats_have_no_rule() -> None:
    with pytest.raises(DtypeError, match=r"torch\.float16 is not supported; use float32 or bfloat16"):
        DtypeRule.trained(torch.float16)
    for broken in ({}, {"main": "float16", "exceptions": {}}, {"main": "float32", "exceptions": []}):
        with pytest.raises(DtypeError):
            DtypeRule.from_json(broken)


def test_what_is_carried_comes_back(tmp_path: Path) -> None:
    opened = open_hf_folder(good_folder(tmp_path / "model", max_position_embeddings=99, **PUBLISHED))
    write_carried(Carried.of(opened), tmp_path / "parent")
    parent = read_carried(tmp_path / "parent")
    assert parent is not None and (parent.settings, parent.dtypes) == (opened.settings, opened.dtype_rule)
    write_carried(parent, tmp_path / "permuted")  # from one checkpoint to the next
    carried = read_carried(tmp_path / "permuted")
    assert carried is not None and carried.settings == opened.settings
    assert carried.tokenizer_folder == tmp_path / "permuted" / "hugging_face"
    for path in opened.tokenizer_files:
        assert (carried.tokenizer_folder / path.name).read_bytes() == path.read_bytes()
    assert read_carried(tmp_path) is None
    (carried.tokenizer_folder / "tokenizer.json").unlink()
    with pytest.raises(CarriedError, match=r"missing or left over: tokenizer\.json"):
        read_carried(tmp_path / "permuted")
    (carried.tokenizer_folder / SETTINGS_FILE).write_text('{"version": 2}')
    with pytest.raises(CarriedError, match="is of version 2, this release reads 1"):
        read_carried(tmp_path / "permuted")
    (carried.tokenizer_folder / SETTINGS_FILE).unlink()
    with pytest.raises(CarriedError, match=r"settings\.json is missing"):
        read_carried(tmp_path / "permuted")


def test_space_is_asked_for_where_it_will_be_needed(tmp_path: Path) -> None:
    target = tmp_path / "not" / "there" / "yet"
    check_free_space(target, 1, "a test")
    with pytest.raises(DiskSpaceError, match=r"not enough disk for a test in .*1,000,000,000\.00 GB needed, .*GB free"):
        check_free_space(target, 10**18, "a test")
    assert not (tmp_path / "not").exists()


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
        torch.equal(opened.tensors[name].nan_to_num(), read[name].nan_to_num()) and read[name].dtype == dtype
        for name, dtype in opened.dtypes.items()
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
