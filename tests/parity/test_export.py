"""An exported folder is a stock model: it loads without remarks, gives the same logits, and generates."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from elastic.hf.card import CardInfo
from elastic.hf.config import ExportError
from elastic.hf.export import ExportReport, FolderCheck, export_folder
from elastic.hf.export_settings import DtypeRule, ExportSettings, HfSettings
from elastic.hf.folder import HfFolderError, open_hf_folder
from elastic.hf.names import from_hf
from elastic.hf.nested_values import value_check
from elastic.hf.reload import logit_check, stock_logits
from elastic.hf.tokenizer_files import find_tokenizer
from elastic.rank.slicing import TensorSource
from elastic.space.cost import Budget, Metric, shape_cost, subnet_cost
from elastic.space.shape import ModelShape, Subnet
from tests.nested import submodel_tensors
from tests.parity.hf_models import SHAPES, card_of, logits, stock_model, tiny

FP32, BF16 = ExportSettings(DtypeRule(torch.float32)), ExportSettings(DtypeRule.trained(torch.bfloat16))
SHAPE = tiny("M-*")
CARD = card_of(SHAPE)


def parent_tensors(shape: ModelShape) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Return a stock model's tensors under Megatron-Core names, and the model as a reference."""
    model = stock_model(shape)
    return dict(from_hf(model.state_dict(), shape)), lambda tokens: logits(model, tokens)


def all_values(tensors: TensorSource, shape: ModelShape = SHAPE) -> FolderCheck:
    """Return the check of an export that cuts nothing."""
    return value_check(tensors, shape, Subnet.full(shape), lanes=1)


def export(
    folder: Path, shape: ModelShape = SHAPE, exports: ExportSettings = FP32, shard_bytes: int = 10**9
) -> ExportReport:
    tensors, reference = parent_tensors(shape)
    check = logit_check(reference, tolerance=1e-5)
    return export_folder(tensors, shape, folder, card_of(shape), exports, check, shard_bytes)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_loads_in_stock_transformers_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    report = export(tmp_path / "model", shape)
    assert report.outcome.verification == "logits of the reloaded folder against the subnet's"
    assert report.outcome.relative is not None and report.outcome.relative < 1e-5
    assert report.params == shape_cost(shape).params
    opened = open_hf_folder(report.folder)
    source, _ = parent_tensors(shape)
    back = dict(from_hf(opened.tensors, shape))
    assert opened.shape == shape
    assert back.keys() == source.keys() and all(torch.equal(back[key], source[key]) for key in source)


def test_an_export_generates_without_remote_code(tmp_path: Path) -> None:
    folder = export(tmp_path / "model").folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    answer = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    greedy = prompt
    for _ in range(6):
        greedy = torch.cat([greedy, logits(model, greedy)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, greedy)


def test_small_time_steps_survive_the_reload(tmp_path: Path) -> None:
    """Stock code clamps dt at time_step_min; the exported value must leave steps far below the default 0.001 alone."""
    model = stock_model(SHAPE)
    with torch.no_grad():
        model.model.layers[0].mixer.dt_bias.fill_(-9.0)
        model.model.layers[0].mixer.in_proj.weight.mul_(0.1)
        model.model.layers[0].mixer.out_proj.weight.mul_(100)
    tensors = dict(from_hf(model.state_dict(), SHAPE))
    report = export_folder(
        tensors,
        SHAPE,
        tmp_path / "model",
        CARD,
        FP32,
        logit_check(lambda tokens: logits(model, tokens), 1e-5),
    )
    config = json.loads((report.folder / "config.json").read_text())
    (report.folder / "config.json").write_text(json.dumps(config | {"time_step_min": 0.001}))
    tokens = torch.arange(20).view(1, 20)
    moved = (stock_logits(report.folder, tokens)[0] - logits(model, tokens)).abs().max()
    assert moved > 1e-3, "the clamp does nothing here, so this test would not notice it"


def test_a_heterogeneous_subnet_is_padded_and_the_card_says_so(tmp_path: Path) -> None:
    parent = tiny("M-*M-*-", tied_embeddings=True)
    chosen = {"hidden": 24, "ffn": (8, 24, 16), "mamba_heads": (4, 4), "head_channels": 4, "attention_heads": (2, 4)}
    subnet = Subnet(**chosen, kept_layers=(0, 1, 2, 4, 5, 6))
    tensors, _ = parent_tensors(parent)
    shape = subnet.shape(parent)
    cut = submodel_tensors(tensors, parent, subnet, lanes=4)
    cost = subnet_cost(parent, subnet)
    card = CardInfo(
        "A small submodel",
        parent=parent,
        subnet=subnet,
        budget=Budget("small", Metric.PARAMS, 2.0 * cost.params),
        provenance={"parent checkpoint": "made for a test"},
    )
    licensed = replace(FP32, settings=HfSettings(license={"license": "apache-2.0"}))
    report = export_folder(
        cut, shape, tmp_path / "model", card, licensed, value_check(tensors, parent, subnet, lanes=4)
    )
    assert report.params == cost.params == sum(tensor.numel() for tensor in cut.values())
    stored = load_file(report.folder / "model.safetensors")
    assert report.stored_params == sum(tensor.numel() for tensor in stored.values()) > report.params
    assert stock_logits(report.folder, torch.arange(8).view(1, 8))[1] == report.stored_params
    text = (report.folder / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        "24 (parent 32)",
        "8, 24, 16 (parent 48)",
        "8, 24, 16 -> 24",
        "2, 4 -> 4",
        "| parent layers left out | 3 |",
        "used 50.0%",
        f"| parameters (what budgets in `params` count) | {report.params:,} |",
        f"(`stored_params`) | {report.stored_params:,} |",
        "made for a test",
        "logits were not compared",
        "hidden = 24 is not a multiple of 64",
    ):
        assert part in text


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    report = export(tmp_path / "model", shard_bytes=8_000)
    assert len(list(report.folder.glob("model-*-of-*.safetensors"))) > 2
    assert report.outcome.relative is not None and report.outcome.relative < 1e-5


def test_bf16_keeps_the_state_space_parameters_in_fp32(tmp_path: Path) -> None:
    tensors, _ = parent_tensors(SHAPE)
    report = export_folder(tensors, SHAPE, tmp_path / "model", CARD, BF16, all_values(tensors))
    stored = load_file(report.folder / "model.safetensors")
    wide = {name.rsplit(".", 1)[1] for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {"A_log", "D"}
    assert torch.equal(stored["backbone.layers.0.mixer.A_log"], tensors["decoder.layers.0.mixer.A_log"])
    model = AutoModelForCausalLM.from_pretrained(report.folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    rounded = ExportSettings(DtypeRule(torch.bfloat16))
    report = export_folder(tensors, SHAPE, tmp_path / "rounded", CARD, rounded, all_values(tensors))
    assert {tensor.dtype for tensor in load_file(report.folder / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_moved_logits_stop_the_export_and_leave_nothing(wrong: float, tmp_path: Path) -> None:
    tensors, reference = parent_tensors(SHAPE)
    folder = tmp_path / "model"

    def moved(tokens: Tensor) -> Tensor:
        answer = reference(tokens)
        answer[0, -1, 0] += wrong * answer.abs().max()
        return answer

    with pytest.raises(ExportError, match="logits of the reloaded folder differ"):
        export_folder(tensors, SHAPE, folder, CARD, FP32, logit_check(moved))
    assert not list(tmp_path.iterdir())
    export_folder(tensors, SHAPE, folder, CARD, FP32, logit_check(reference))
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_content_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ExportError, match="is not empty; choose another one or set overwrite"):
        export_folder({}, SHAPE, tmp_path, CARD, FP32, all_values({}))
    with pytest.raises(ExportError, match="is a file"):
        export_folder({}, SHAPE, tmp_path / "precious.txt", CARD, FP32, all_values({}))


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path) -> None:
    huge = tiny("-", vocab=2**22, hidden=2**22)
    with pytest.raises(ExportError, match=r"not enough disk for the exported weights in .* GB needed, .* GB free on"):
        export_folder({}, huge, tmp_path / "new" / "model", CARD, FP32, all_values({}, huge))
    assert not list(tmp_path.iterdir())


def test_without_a_reference_every_value_is_compared_with_the_parents(tmp_path: Path) -> None:
    tensors, _ = parent_tensors(SHAPE)
    reads: list[str] = []

    def unsteady(name: str) -> Tensor:
        reads.append(name)
        return tensors[name] + (reads.count(name) > 1 and name.endswith("linear_fc2.weight"))

    with pytest.raises(ExportError, match=r"layers\.1\.mixer\.down_proj\.weight: row 0 is not row 0"):
        export_folder(unsteady, SHAPE, tmp_path / "model", CARD, FP32, all_values(unsteady))
    assert not list(tmp_path.iterdir())


def test_tokenizer_files_come_along_and_code_stays(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 38}}, "added_tokens": [{"id": 39}]}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text("{}")
    (source / "tokenization_mine.py").write_text("raise SystemExit")
    exports = replace(FP32, tokenizer_files=find_tokenizer(source), settings=HfSettings(eos_token_id=(2, 3)))
    folder = export(tmp_path / "model", exports=exports).folder
    assert json.loads((folder / "tokenizer.json").read_text()) == tokenizer
    assert (folder / "tokenizer_config.json").is_file() and not list(folder.glob("*.py"))
    assert open_hf_folder(folder).exports.settings.eos_token_id == (2, 3)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": [{"id": 40}]}))
    with pytest.raises(ExportError, match="has token 40, the model's vocabulary is 40"):
        export(tmp_path / "other", exports=exports)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_does_not_match_its_config_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path / "model").folder
    weights = load_file(folder / "model.safetensors")
    bad = weights | {"backbone.norm_f.weight": torch.zeros(31)}
    save_file(bad, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HfFolderError, match=r"backbone\.norm_f\.weight is \(31,\), the config says \(32,\)"):
        open_hf_folder(folder)
    del bad["backbone.norm_f.weight"]
    save_file(bad, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HfFolderError, match=r"missing: backbone\.norm_f\.weight"):
        open_hf_folder(folder)
    with pytest.raises(ExportError, match=r"missing_keys: model\.norm_f\.weight"):
        stock_logits(folder, torch.zeros(1, 4, dtype=torch.int64))
    (folder / "config.json").write_text("[]")
    with pytest.raises(HfFolderError, match="must hold a JSON object"):
        open_hf_folder(folder)
