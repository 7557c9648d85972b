"""The verbs import_hf and extract against stock folders: no bit changed there and back, equal logits at TP 1 and 2."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.read import StoredTensors
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import CheckpointError, Trainable, load_checkpoint
from elastic.checkpoint.stream import UnfinishedError
from elastic.config.load import load
from elastic.config.serving import ExtractConfig, ImportConfig, SubnetConfig
from elastic.hf.config import ExportError, HfSettings, hf_config
from elastic.hf.dtypes import DtypeRule
from elastic.hf.tensor_files import TensorFolder
from elastic.model.model import Layout, build_model
from elastic.run.folder import RunFolderError
from elastic.space.cost import shape_cost
from elastic.space.shape import ModelShape
from elastic.verbs.export_check import logits_in_child, nested_logits
from elastic.verbs.extract import EXTRACTION_FILE, run_extract
from elastic.verbs.import_hf import run_import
from elastic.world.groups import join_world
from tests.distributed.harness import run_distributed
from tests.parity.hf_models import SHAPES, logits, relative_error, stock_model, tiny
from tests.parity.model_factory import submodel_space

QUIET, BF16 = Console(quiet=True), DtypeRule.trained(torch.bfloat16)
TOKENS = torch.randint(40, (2, 33), generator=torch.Generator().manual_seed(0))
FORMATS = ("fp32", "bf16", "bf16 with fp32 A_log and D")
# Each shape with one of the three number formats; the last one is a wide head as in the published parent.
CASES = {name: FORMATS[number % 3] for number, name in enumerate(SHAPES)} | {"head channels 80": FORMATS[2]}
WIDE = tiny("M*-", mamba_groups=8, mamba_heads=8, head_channels=80, hidden=64, ffn=64)
SPLITTABLE = [name for name, shape in SHAPES.items() if shape.mamba_groups % 2 == 0 and shape.kv_heads % 2 == 0]


def shape_of_case(name: str) -> ModelShape:
    return SHAPES.get(name, WIDE)


def stored(model: PreTrainedModel, number_format: str) -> PreTrainedModel:
    if number_format == "fp32":
        return model
    wide = ("A_log", ".D") if number_format.endswith("D") else ()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(wide or ("nothing",)):
                parameter.data = parameter.data.bfloat16()
    return model


def stock_folder(folder: Path, shape: ModelShape, number_format: str) -> PreTrainedModel:
    """Save a random model as stock transformers does, with a tokenizer and settings for generation."""
    model = stored(stock_model(shape), number_format)
    model.config.dtype = torch.float32 if number_format == "fp32" else torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0, do_sample=True, top_p=0.9
    )
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 39}, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= {name.replace("model.", "backbone.", 1): tensor for name, tensor in load_file(path).items()}
    return found


def place(folder: Path, name: str) -> dict[str, Any]:
    return {"exp_dir": str(folder), "name": name, "version": "v"}


def imported(folder: Path, source: Path, name: str = "imported") -> Path:
    return run_import(load(ImportConfig, {"source": str(source), "exp_manager": place(folder, name)}), QUIET)


def extracted(folder: Path, checkpoint: Path, name: str = "back", **values: Any) -> Path:
    config = {"init_from": {"checkpoint": str(checkpoint)}, "exp_manager": place(folder, name), **values}
    return run_extract(load(ExtractConfig, config), QUIET)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_no_bit_changes(name: str, tmp_path: Path) -> None:
    shape = shape_of_case(name)
    stock_folder(tmp_path / "stock", shape, CASES[name])
    run = imported(tmp_path, tmp_path / "stock")
    checkpoint = resolve_checkpoint(run)
    assert Record.read(checkpoint).shape == shape
    tensors = StoredTensors(checkpoint, shape)
    assert sum(tensors[parameter].numel() for parameter in tensors) == shape_cost(shape).params
    back = extracted(tmp_path, run, export={"shard_bytes": 30_000}) / "parent"
    original, returned = weights(tmp_path / "stock"), weights(back)
    assert returned.keys() == original.keys()
    for key, tensor in original.items():
        assert returned[key].dtype == tensor.dtype and torch.equal(returned[key], tensor), key
    assert (back / "tokenizer.json").read_bytes() == (tmp_path / "stock" / "tokenizer.json").read_bytes()
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation["top_p"] == 0.9 and generation["eos_token_id"] == [2, 3]
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (back, tmp_path / "stock"))
    fixed_by_the_rules = {"time_step_min", "time_step_limit", "_name_or_path", "transformers_version"}
    fixed_by_the_rules |= set() if shape.attention_heads else {"use_cache"}
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert different <= fixed_by_the_rules, {key: (ours.get(key), theirs.get(key)) for key in different}


def test_a_folder_of_our_own_style_comes_back_with_an_equal_config(tmp_path: Path) -> None:
    shape = SHAPES["groups 4, five queries per KV head"]
    stock_folder(tmp_path / "stock", shape, "bf16")
    config = hf_config(shape, HfSettings(max_position_embeddings=777, chunk_size=64), torch.bfloat16)
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    back = extracted(tmp_path, imported(tmp_path, tmp_path / "stock")) / "parent"
    assert json.loads((back / "config.json").read_text()) == config


def our_logits(checkpoint: Path, shape: ModelShape, tensor_parallel: int) -> Tensor:
    """Load the imported checkpoint on this rank and return its rows of the logits [B, S, v]."""
    layout = Layout(tensor=tensor_parallel)
    join_world(layout, torch.device("cpu"))
    model = build_model(submodel_space(shape), layout).eval()
    load_checkpoint(checkpoint, Trainable(model))
    with torch.no_grad():
        return (model(TOKENS) @ model.head_weight().T).transpose(0, 1)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("name", SPLITTABLE)
def test_the_imported_parent_answers_like_stock_transformers(name: str, tensor_parallel: int, tmp_path: Path) -> None:
    shape = SHAPES[name]
    model = stock_folder(tmp_path / "stock", shape, "fp32")
    checkpoint = resolve_checkpoint(imported(tmp_path, tmp_path / "stock"))
    rows = run_distributed(our_logits, tensor_parallel, checkpoint, shape, tensor_parallel)
    assert relative_error(torch.cat(rows, dim=-1), logits(model, TOKENS)) < 1e-5


def test_a_subnet_leaves_checked_by_logits_or_by_values(tmp_path: Path) -> None:
    shape = SHAPES["groups 8, twelve layers"]
    stock_folder(tmp_path / "stock", shape, "bf16")
    run = imported(tmp_path, tmp_path / "stock")
    kept = [0, 1, 3, 4, 6, 7, 9, 11]
    by_hand = {
        "name": "small",
        "hidden": 24,
        "ffn": [32],
        "mamba_heads": [8],
        "attention_heads": [4],
        "kept_layers": kept,
    }
    rows = {}
    for check in ("logits", "values", "auto"):
        export = {"check": check, "shard_bytes": 10_000, "megatron": check == "auto"}
        folder = extracted(tmp_path, run, check, subnets=[by_hand], export=export)
        rows[check] = {row["name"]: row for row in json.loads((folder / EXTRACTION_FILE).read_text())["members"]}
        card = (folder / "small" / "README.md").read_text()
        assert ("logits were not compared" in card) == (check == "values")
    assert rows["logits"]["small"]["max_abs_logit_diff"] < 1e-4 and rows["auto"]["small"]["max_abs_logit_diff"] < 1e-4
    assert "every stored value" in rows["values"]["small"]["verification"]
    folders = [Path(rows[check]["small"]["hugging_face"]) for check in rows]
    first, *others = (weights(folder) for folder in folders)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    _, info = AutoModelForCausalLM.from_pretrained(folders[0], trust_remote_code=False, output_loading_info=True)
    assert not any(info.values())
    cut_again = extracted(tmp_path, Path(rows["auto"]["small"]["megatron"]), "from_submodel") / "parent"
    assert all(torch.equal(first[key], tensor) for key, tensor in weights(cut_again).items())


def narrowed(shape: ModelShape) -> dict[str, Any]:
    """Describe a subnet by hand that is narrower on every axis that the shape can narrow, without its last layer."""
    given: dict[str, Any] = {"name": "narrow", "hidden": shape.hidden * 3 // 4}
    given["kept_layers"] = list(range(len(shape.pattern) - 1))
    if shape.ffn:
        given["ffn"] = [shape.ffn[0] // 2]
    if shape.mamba_heads and shape.mamba_heads[0] > shape.mamba_groups:
        given["mamba_heads"] = [shape.mamba_heads[0] - shape.mamba_groups]
    given["head_channels"] = shape.head_channels - 1
    if shape.attention_heads and shape.attention_heads[0] > shape.kv_heads:
        given["attention_heads"] = [shape.attention_heads[0] - shape.kv_heads]
    return given


@pytest.mark.parametrize("name", CASES)
def test_exported_submodels_load_without_a_complaint_and_generate(name: str, tmp_path: Path) -> None:
    shape = shape_of_case(name)
    stock_folder(tmp_path / "stock", shape, CASES[name])
    run = imported(tmp_path, tmp_path / "stock")
    folder = extracted(tmp_path, run, "cut", budget_names=[], subnets=[narrowed(shape)]) / "narrow"
    rows = json.loads((tmp_path / "cut" / "v" / EXTRACTION_FILE).read_text())["members"]
    assert [row["name"] for row in rows] == ["narrow"] and rows[0]["max_abs_logit_diff"] < 1e-3
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    answer = model.generate(TOKENS[:1, :5], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape == (1, 8)


def test_an_import_is_gone_on_with_and_never_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["groups 8, twelve layers"]
    stock_folder(tmp_path / "stock", shape, "fp32")
    read, count = TensorFolder.__getitem__, 0

    def killed(self: TensorFolder, name: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 60:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(TensorFolder, "__getitem__", killed)
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path, tmp_path / "stock")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        resolve_checkpoint(tmp_path / "imported" / "v")
    before = count
    run = imported(tmp_path, tmp_path / "stock")
    assert count - before < len(weights(tmp_path / "stock")), "the finished layers were read again"
    with pytest.raises(RunFolderError, match="holds a whole checkpoint already"):
        imported(tmp_path, tmp_path / "stock")
    monkeypatch.setattr(TensorFolder, "__getitem__", read)
    back = extracted(tmp_path, run) / "parent"
    original = weights(tmp_path / "stock")
    assert all(torch.equal(original[key], tensor) for key, tensor in weights(back).items())


def test_an_import_is_not_gone_on_with_from_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "fp32")
    (tmp_path / "stock" / "adapter.json").symlink_to("nowhere")  # nobody reads it
    template = tmp_path / "stock" / "chat_template.jinja"
    template.write_text("{{ messages }}")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Record, "write", killed)  # when the template has been copied already
        imported(tmp_path, tmp_path / "stock")
    template.rename(tmp_path / "elsewhere")
    with pytest.raises(UnfinishedError, match=r"left unfinished by another run: .*chat_template\.jinja"):
        imported(tmp_path, tmp_path / "stock")
    (tmp_path / "elsewhere").rename(template)
    checkpoint = resolve_checkpoint(imported(tmp_path, tmp_path / "stock"))
    assert (checkpoint / "hugging_face" / template.name).read_text() == "{{ messages }}"


def test_a_child_without_a_gpu_computes_the_same_logits(tmp_path: Path) -> None:
    shape = SHAPES["groups 4, five queries per KV head"]
    stock_folder(tmp_path / "stock", shape, "bf16")
    checkpoint = resolve_checkpoint(imported(tmp_path, tmp_path / "stock"))
    subnet = SubnetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in narrowed(shape).items()}).subnet(
        shape
    )
    here, child = (compute(checkpoint, subnet, BF16, TOKENS) for compute in (nested_logits, logits_in_child))
    assert here.shape == (*TOKENS.shape, shape.vocab) and relative_error(child, here) < 1e-6
    with pytest.raises(ExportError, match="not computed"):
        logits_in_child(tmp_path / "nowhere", subnet, BF16, TOKENS)


def test_a_malformed_folder_leaves_nothing(tmp_path: Path) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "fp32")
    shard = sorted((tmp_path / "stock").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=shard.name):
        imported(tmp_path, tmp_path / "stock")
    assert not (tmp_path / "imported").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "fp32")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="not enough disk for the checkpoint"):
        imported(tmp_path, tmp_path / "stock")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["groups 2, tied head", "groups 1, odd head channels"])
def test_a_vocabulary_filled_up_on_import_is_cut_again_on_export(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name].with_vocab(37)
    stock_folder(tmp_path / "stock", shape, "fp32")
    (tmp_path / "stock" / "tokenizer.json").unlink()
    (tmp_path / "stock" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\nlicense: x\n"
    )
    config = load(
        ImportConfig,
        {"source": str(tmp_path / "stock"), "exp_manager": place(tmp_path, "even"), "vocab_multiple": 8},
    )
    run = run_import(config, QUIET)
    assert Record.read(resolve_checkpoint(run)).shape == shape.with_vocab(40)
    for check in ("logits", "values"):
        folder = extracted(tmp_path, run, check, export={"check": check}) / "parent"
        original, returned = weights(tmp_path / "stock"), weights(folder)
        assert returned.keys() == original.keys()
        assert all(torch.equal(returned[key], tensor) for key, tensor in original.items())
        row = json.loads((folder.parent / EXTRACTION_FILE).read_text())["members"][0]
        assert row["params"] == shape_cost(shape).params
        assert row["stored_params"] == sum(tensor.numel() for tensor in returned.values())
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlicense: other\nlicense_name: mine\nlibrary_name") and "license: x" not in card


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_tensor_is_named_and_the_mended_folder_imported(value: float, tmp_path: Path) -> None:
    stock_folder(tmp_path / "stock", SHAPES["groups 2, tied head"], "bf16")
    shard = sorted((tmp_path / "stock").glob("model-*.safetensors"))[-1]
    good, tensors = shard.read_bytes(), load_file(shard)
    name = next(name for name in tensors if name.endswith("up_proj.weight") or name.endswith("norm.weight"))
    tensors[name].view(-1)[1] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    named = name.replace("model.", "backbone.", 1)
    with pytest.raises(ValueError, match=rf"{named} is damaged: 1 of its \d+ values are NaN or infinite"):
        imported(tmp_path, tmp_path / "stock")
    shard.write_bytes(good)
    assert resolve_checkpoint(imported(tmp_path, tmp_path / "stock")).is_dir()
