"""Exports run in the engines people use, each in its own environment (`make test-engines`), against the subnet."""

import json
from pathlib import Path

import pytest

from elastic.config.load import load
from elastic.config.verbs import ExtractConfig
from elastic.engines.check import NEW_TOKENS, PROMPTS, check_in_engine, missing_environment
from elastic.hf.config import ExportError
from elastic.verbs.extract import EXTRACTION_FILE
from elastic.verbs.inputs import input_problems
from tests.parity.hf_models import SHAPES, logits
from tests.parity.import_extract import extracted, imported, stock_folder

SHAPE = SHAPES["groups 8, twelve layers"]
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


@pytest.mark.parametrize("engine", ["mlx", pytest.param("llama_cpp", marks=pytest.mark.slow)])
def test_a_subnet_with_ffn_widths_of_its_own_runs_in_an_engine(engine: str, tmp_path: Path) -> None:
    needs(engine)
    model = stock_folder(tmp_path / "stock", SHAPE, "fp32")
    (tmp_path / "stock" / "tokenizer.json").unlink()
    run = imported(tmp_path, tmp_path / "stock")
    by_hand = {"name": "small", "ffn": [SHAPE.ffn[0] // 2, *[SHAPE.ffn[0]] * (len(SHAPE.ffn) - 1)]}
    export = {"check": ["values", engine], "format": "gguf", "gguf_types": ["f32", "f16", "q8_0"]}
    export |= {"hugging_face": engine == "mlx", "format": "hf"} if engine == "mlx" else {"hugging_face": False}
    folder = extracted(tmp_path, run, "cut", subnets=[by_hand], budget_names=[], export=export)
    row = json.loads((folder / EXTRACTION_FILE).read_text())["members"][0]
    assert len(row["engines"]) == (1 if engine == "mlx" else 3)
    assert "Loads and agrees in" in row["engines"][0] and ALL_EQUAL in row["engines"][0]
    written = Path(row["hugging_face"] if engine == "mlx" else row["gguf"])
    assert row["engines"][0] in (written / "README.md").read_text()
    file = written if engine == "mlx" else written / "small-F32.gguf"
    with pytest.raises(ExportError, match="computes another model"):  # the parent is not this subnet
        check_in_engine(engine, file, SHAPE.vocab, lambda tokens: logits(model, tokens))
