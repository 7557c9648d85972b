"""An own stock model and own text, by the commands of docs/own_model.md alone: a family in stock transformers."""

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic.config.load import config_dict
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ModelConfig
from elastic.config.verbs import ElasticConfig
from elastic.hf.folder import open_hf_folder
from elastic.verbs.import_hf import next_commands
from elastic.verbs.inputs import load_run
from recipes._common import CONF
from recipes._tiny_family import prepare_corpus
from recipes._verbs import VERBS
from tests.distributed.harness import run_distributed
from tests.distributed.training import write_corpus
from tests.parity.import_extract import stock_folder
from tests.unit.config.test_conf_files import compose_once

ROOT = Path(__file__).parents[2]
SHAPE = ModelConfig(
    pattern="M-M*-M-", vocab=300, hidden=64, ffn=120, mamba_heads=8, head_channels=8, mamba_groups=2, mamba_state=16,
    attention_heads=8, kv_heads=2, attention_channels=16,
).shape()  # fmt: skip
# Beside the commands: a few steps on a little text instead of minutes on much.
SHORTER = {
    "estimate_importance": [
        f"importance.{key}" for key in ("num_sequences=4", "depth_sequences=4", "sequence_length=32")
    ],
    "train_elastic": [
        "data.validation_sequences=2",
        "elastic.router.hidden_width=16",
        *(f"curriculum.{i}.{key}" for i in (0, 1) for key in ("steps=3", "global_batch=4", "sequence_length=32")),
        *("curriculum.0.lr.warmup_steps=1", "curriculum.0.router_lr.warmup_steps=1"),
    ],
}


def documented_commands(model: Path, texts: Path) -> list[tuple[str, list[str]]]:
    """Return (verb, arguments) of the commands in the first block of docs/own_model.md, for a model and a text."""
    block = (ROOT / "docs" / "own_model.md").read_text().partition("```text\n")[2].partition("```")[0]
    found = re.findall(r"^\$ .*recipes/(\w+)\.py(.*)$", block, flags=re.M)
    return [(verb, rest.replace("MODEL", str(model)).replace("TEXTS", str(texts)).split()) for verb, rest in found]


def follow(folder: Path) -> dict[str, str]:
    """Make a stock model and a text, then run the documented commands; returns what each showed."""
    write_corpus(folder / "texts")
    (folder / "corpus").symlink_to(folder / "texts")
    prepare_corpus(folder)  # for a tokenizer that the model brings along
    stock_folder(folder / "model", SHAPE, "bf16")
    for path in (folder / "data").glob("*token*.json"):
        shutil.copy(path, folder / "model" / path.name)
    os.chdir(folder)
    shown = {}
    for verb, arguments in documented_commands(folder / "model", folder / "texts"):
        cfg = compose_once(VERBS[verb].run_name or verb, (*arguments, *SHORTER.get(verb, ())))
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
        screen = io.StringIO()
        config: Any = load_run(VERBS[verb].config, values, Cluster(), is_main=True)
        VERBS[verb].body(config, Console(file=screen, width=300))
        shown[verb] = screen.getvalue()
    return shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def shown(folder: Path) -> dict[str, str]:
    answer: dict[str, str] = run_distributed(follow, 1, folder, timeout_s=250)[0]
    return answer


def test_five_commands_lead_from_a_stock_folder_to_a_family(folder: Path, shown: dict[str, str]) -> None:
    assert sorted(shown) == ["estimate_importance", "extract", "import_hf", "prepare_data", "train_elastic"]
    assert "hidden: 64 56 48 40 32" in shown["train_elastic"] and "budgets: full " in shown["train_elastic"]
    for name in ("full", "medium", "small"):
        export = folder / "runs" / "export" / "version_0" / name
        model, info = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values())
        ids = AutoTokenizer.from_pretrained(export)("the small model", return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_the_import_says_what_to_type_next(folder: Path, shown: dict[str, str]) -> None:
    printed = re.findall(r"recipes/(\w+)\.py (.*)", shown["import_hf"])
    documented = {verb: arguments for verb, arguments in documented_commands(folder / "model", Path("TEXTS"))}
    assert [verb for verb, _ in printed] == [verb for verb in documented if verb != "import_hf"]
    for verb, arguments in printed:
        # The page leaves out the version, of which a new run has one; the screen names the very folder.
        assert set(arguments.replace("/version_0", "").split()) <= set(documented[verb]), verb
    offered = yaml.safe_load((folder / "runs" / "imported" / "version_0" / "family.yaml").read_text())
    offered["elastic"]["budgets"][2]["ratio"] = 0.01
    source = open_hf_folder(folder / "model")
    elsewhere = "\n".join(next_commands(source, Path("/far/imported/version_0"), offered))
    assert re.search(r"budgets=halves: elastic.budgets.2.ratio = 0.01: .*, a ratio of 0\.\d+$", elsewhere, flags=re.M)
    assert "budgets=halves" not in shown["import_hf"], "its budgets fit"
    for verb, arguments in re.findall(r"recipes/(\w+)\.py (.*)", elsewhere):
        assert verb == "prepare_data" or arguments.endswith(" exp_manager.exp_dir=/far"), "the next one looks there"


def test_the_import_offers_a_run_that_is_what_the_defaults_give(folder: Path, shown: dict[str, str]) -> None:
    run = folder / "runs" / "imported" / "version_0"
    assert f"--config-dir={run.relative_to(folder)} --config-name=family" in shown["import_hf"]
    given = (f"data.path={folder}/data/own", f"init_from.permuted_parent={folder}/runs/permuted_parent")
    overrides = [f"++{text}" for text in (*given, f"exp_manager.exp_dir={folder}/other", *SHORTER["train_elastic"])]
    found = []
    for name, where in (("train_elastic", CONF), ("family", run)):
        with initialize_config_dir(config_dir=str(where), version_base=None):
            cfg = compose(name, [*overrides, f"hydra.searchpath=[file://{CONF}]"])
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
        found.append((values, config_dict(load_run(ElasticConfig, values, Cluster(), is_main=True))))
    (_, by_default), (offered, loaded) = found
    assert offered["model"]["pattern"] == "M-M*-M-" and offered["model"]["hidden"] == 64
    assert offered["elastic"]["space"]["hidden"]["choices"] == [64, 56, 48, 40, 32]
    assert loaded == by_default
