"""Exports run in the engines people use, each in its own environment (`make test-engines`), against the subnet."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from elastic.config.load import load
from elastic.config.verbs import ExtractConfig
from elastic.engines.check import ENGINES, NEW_TOKENS, PROMPTS, check_in_engine, missing_environment, unfit
from elastic.hf.config import ExportError
from elastic.verbs.extract import EXTRACTION_FILE
from elastic.verbs.inputs import checkpoint_problems, input_problems
from tests.parity.hf_models import SHAPES, logits
from tests.parity.import_extract import extracted, imported, stock_folder

SHAPE = replace(SHAPES["groups 8, twelve layers"], attention_channels=32)  # the fewest that vLLM takes on a CPU
FULL = SHAPE.ffn[0]
# Widths of a layer's own, which a stock folder pads; SMALL is narrower on every axis, and 8 heads x 3 channels is no
# multiple of 64.
MEDIUM = {"name": "medium", "ffn": [FULL // 2, *[FULL] * (len(SHAPE.ffn) - 1)]}
SMALL = {
    "name": "small",
    "hidden": 24,
    "ffn": [16, FULL, 8, FULL, 24],
    "mamba_heads": [8],
    "head_channels": 3,
    "attention_heads": [4],
    "kept_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11],
}
ALL_EQUAL = f"{PROMPTS * NEW_TOKENS} of {PROMPTS * NEW_TOKENS} greedy tokens"


def needs(engine: str) -> None:
    if missing_environment(engine) is not None:
        pytest.skip(f"{engine} has no environment here: make engine-{engine}")


def test_an_engine_without_an_environment_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", "/nowhere")
    config = load(ExtractConfig, {"init_from": {"checkpoint": "x"}, "export": {"check": ["auto", "mlx"]}})
    problem = next(problem for problem in input_problems(config) if problem.field == "export.check")
    assert "mlx has no environment in /nowhere/engines/mlx" in problem.rule
    assert problem.remedy == "make it with `make engine-mlx`"


def test_heads_that_vllm_has_no_attention_for_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    narrow = SHAPES["groups 2, tied head"]
    stock_folder(tmp_path / "stock", narrow, "fp32")
    run = imported(tmp_path, tmp_path / "stock")
    config = load(ExtractConfig, {"init_from": {"checkpoint": str(run)}, "export": {"check": ["values", "vllm"]}})
    (problem,) = checkpoint_problems(config)
    assert problem.field == "export.check" and problem.remedy == "leave vllm out"
    assert problem.rule.endswith(f"512 channels, the model's have {narrow.attention_channels}")
    assert unfit("vllm", SHAPE.attention_channels) is unfit("mlx", narrow.attention_channels) is None


def family(folder: Path) -> tuple[PreTrainedModel, Path]:
    """Return a random parent of SHAPE without a tokenizer, and the run that holds it."""
    model = stock_folder(folder / "stock", SHAPE, "fp32")
    (folder / "stock" / "tokenizer.json").unlink()
    return model, imported(folder, folder / "stock")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / EXTRACTION_FILE).read_text())["members"]


def test_a_subnet_with_ffn_widths_of_its_own_runs_in_mlx(tmp_path: Path) -> None:
    needs("mlx")
    model, run = family(tmp_path)
    folder = extracted(tmp_path, run, subnets=[MEDIUM], budget_names=[], export={"check": ["values", "mlx"]})
    (row,) = rows_of(folder)
    (said,) = row["engines"]
    assert said.startswith("Loads and agrees in mlx-lm") and ALL_EQUAL in said
    written = Path(row["hugging_face"])
    assert said in (written / "README.md").read_text()
    with pytest.raises(ExportError, match="computes another model"):  # the parent is not this subnet
        check_in_engine("mlx", written, SHAPE.vocab, lambda tokens: logits(model, tokens))


@pytest.mark.slow
@pytest.mark.timeout(900)  # twenty starts of engines: three minutes on two free cores
def test_three_budgets_run_in_every_engine(tmp_path: Path) -> None:
    engines = ["transformers", "mlx", "llama_cpp", "vllm"]
    for engine in engines:
        needs(engine)
    model, run = family(tmp_path)
    kinds = ["f32", "f16", "q8_0"]
    export = {"check": ["values", *engines], "format": "gguf", "gguf_types": kinds}
    folder = extracted(tmp_path, run, subnets=[{"name": "full"}, MEDIUM, SMALL], budget_names=[], export=export)
    rows = rows_of(folder)
    assert [row["name"] for row in rows] == ["full", "medium", "small"]
    titles = ["transformers", "mlx-lm", "vLLM", *["llama.cpp"] * len(kinds)]  # in the order in which files are written
    for row in rows:
        for number, (title, said) in enumerate(zip(titles, row["engines"], strict=True)):
            assert f" in {title}" in said
            rounded = number > titles.index("llama.cpp")  # its tokens are counted, not asked for
            assert rounded or ("Loads and agrees in" in said and ALL_EQUAL in said)
        place, padded = Path(row["gguf"]), row["name"] != "full"
        sizes = [(place / f"{row['name']}-{kind.upper()}.gguf").stat().st_size for kind in kinds]
        stored = (Path(row["hugging_face"]) / "model.safetensors").stat().st_size
        assert sizes[0] > sizes[1] >= sizes[2]
        assert (row["stored_params"] > row["params"]) == padded and (sizes[0] < stored or not padded)
    small = {"hf": Path(rows[2]["hugging_face"]), "gguf": Path(rows[2]["gguf"]) / "small-F32.gguf"}
    for engine in ("llama_cpp", "vllm"):
        with pytest.raises(ExportError, match="computes another model"):  # the parent is not this subnet
            check_in_engine(engine, small[ENGINES[engine].reads], SHAPE.vocab, lambda tokens: logits(model, tokens))


@pytest.mark.slow
def test_an_export_in_fp8_runs_in_vllm(tmp_path: Path) -> None:
    needs("vllm")
    model, run = family(tmp_path)
    export = {"check": ["values", "vllm"], "format": "fp8"}
    (row,) = rows_of(extracted(tmp_path, run, subnets=[SMALL], budget_names=[], export=export))
    (said,) = row["engines"]
    assert " in vLLM" in said and f" of {PROMPTS * NEW_TOKENS} greedy tokens" in said
    written = Path(row["hugging_face"])
    assert said in (written / "README.md").read_text()

    def parents(tokens: Tensor) -> Tensor:
        return logits(model, tokens)

    def nearly(tokens: Tensor) -> Tensor:
        return 1.01 * parents(tokens)

    with pytest.raises(ExportError, match="computes another model"):  # the parent is not this subnet
        check_in_engine("vllm", written, SHAPE.vocab, parents, rounded=nearly)
