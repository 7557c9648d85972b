"""The verb extract after import_hf: no bit changed there and back, submodels checked and loaded by stock code."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.read import StoredTensors
from elastic.checkpoint.record import Record
from elastic.config.load import load
from elastic.config.verbs import ImportConfig
from elastic.hf.config import hf_config
from elastic.hf.export_settings import HfSettings
from elastic.space.cost import shape_cost
from elastic.space.shape import ModelShape
from elastic.verbs.extract import EXTRACTION_FILE
from elastic.verbs.import_hf import run_import
from tests.parity.hf_models import SHAPES
from tests.parity.import_extract import (
    CASES,
    QUIET,
    TOKENS,
    extracted,
    imported,
    narrowed,
    place,
    shape_of_case,
    stock_folder,
    weights,
)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelShape, Path, Path]:
    """Return a case's shape, its stock folder, and the run that imported it: once for the tests that read them."""
    folder = tmp_path_factory.mktemp("case")
    shape = shape_of_case(request.param)
    stock_folder(folder / "stock", shape, CASES[request.param])
    return shape, folder / "stock", imported(folder, folder / "stock")


def test_there_and_back_no_bit_changes(case: tuple[ModelShape, Path, Path], tmp_path: Path) -> None:
    shape, stock, run = case
    checkpoint = resolve_checkpoint(run)
    assert Record.read(checkpoint).shape == shape
    tensors = StoredTensors(checkpoint, shape)
    assert sum(tensors[parameter].numel() for parameter in tensors) == shape_cost(shape).params
    screen = io.StringIO()
    back = extracted(tmp_path, run, console=Console(file=screen, width=500), export={"shard_bytes": 30_000}) / "parent"
    assert ("note: it keeps no attention layer" in screen.getvalue()) == (not shape.attention_heads)
    original, returned = weights(stock), weights(back)
    assert returned.keys() == original.keys()
    for key, tensor in original.items():
        assert returned[key].dtype == tensor.dtype and torch.equal(returned[key], tensor), key
    assert (back / "tokenizer.json").read_bytes() == (stock / "tokenizer.json").read_bytes()
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation["top_p"] == 0.9 and generation["eos_token_id"] == [2, 3]
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (back, stock))
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
        folder = extracted(tmp_path, run, check, budget_names=[], subnets=[by_hand], export=export)
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


def test_exported_submodels_load_without_a_complaint_and_generate(
    case: tuple[ModelShape, Path, Path], tmp_path: Path
) -> None:
    shape, _, run = case
    folder = extracted(tmp_path, run, "cut", budget_names=[], subnets=[narrowed(shape)]) / "narrow"
    rows = json.loads((tmp_path / "cut" / "v" / EXTRACTION_FILE).read_text())["members"]
    assert [row["name"] for row in rows] == ["narrow"] and rows[0]["max_abs_logit_diff"] < 1e-3
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    answer = model.generate(TOKENS[:1, :5], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape == (1, 8)


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
