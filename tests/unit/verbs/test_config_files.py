"""Configs and the file system: inputs that are not there or of something else, run folders in use."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from elastic.checkpoint.contents import write_contents
from elastic.checkpoint.record import Record
from elastic.config.load import ConfigError
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ModelConfig
from elastic.config.verbs import (
    CostConfig,
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    GenerateConfig,
    ImportanceConfig,
    ImportConfig,
    PretrainConfig,
)
from elastic.corpus.config import PrepareConfig
from elastic.verbs.inputs import load_run
from elastic.verbs.report_file import output_file_problems
from tests.unit.config.configs import DATA_TOKENS, legal, put, values_of, written_manifest, written_record


def run_values(kind: type, folder: Path) -> dict[str, Any]:
    """Return a legal config of a verb whose run folder, folder/name/version_0, is in use already."""
    run = folder / "name" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    changes: dict[str, object] = {
        "exp_manager.exp_dir": str(folder),
        "exp_manager.name": "name",
        "data.path": written_manifest(folder),
    }
    return values_of(kind, changes | ({"model.vocab": 512} if kind is PretrainConfig else {}))


def test_inputs_that_do_not_exist_and_a_run_folder_in_use_are_named(tmp_path: Path) -> None:
    values = run_values(EvaluateConfig, tmp_path)
    put(values, "init_from.checkpoint", str(tmp_path / "a" / "b"))
    with pytest.raises(ConfigError) as caught:
        load_run(EvaluateConfig, values, Cluster(), is_main=True)
    missing, in_use = caught.value.problems
    assert (missing.field, missing.value) == ("init_from.checkpoint", str(tmp_path / "a" / "b"))
    assert missing.remedy.endswith(str(tmp_path))
    assert (in_use.field, in_use.value) == ("exp_manager.version", "version_0")
    assert "nearest free name is version_1" in in_use.remedy and "overwrite=true" in in_use.remedy
    # Another rank may look after the main process has made the folder: it must not take it for somebody else's.
    put(values, "init_from.checkpoint", written_record(tmp_path / "checkpoint"))
    load_run(EvaluateConfig, values, Cluster(), is_main=False)
    put(values, "exp_manager.overwrite", True)
    load_run(EvaluateConfig, values, Cluster(), is_main=True)


def test_checkpoint_that_is_none_or_does_not_split_over_the_ranks_is_named(tmp_path: Path) -> None:
    values = values_of(ImportanceConfig, {"data.path": written_manifest(tmp_path), "init_from.parent": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"init_from\.parent = .* is neither a checkpoint nor a run folder"):
        load_run(ImportanceConfig, values, Cluster(), is_main=False)
    put(values, "init_from.parent", written_record(tmp_path / "parent", mamba_groups=4))
    put(values, "parallel.tensor", 4)
    put(values, "lanes", 12)
    with pytest.raises(ConfigError) as caught:
        load_run(ImportanceConfig, values, Cluster(4), is_main=False)
    assert [str(problem) for problem in caught.value.problems] == [
        "lanes = 12: must divide the parent's FFN width = 256; nearest legal value is 8",
        "parallel.tensor = 4: must divide model.kv_heads = 2; nearest legal value is 2",
    ]


def test_family_needs_a_parent_permuted_for_its_lanes(tmp_path: Path) -> None:
    folders = {"data.path": written_manifest(tmp_path), "exp_manager.exp_dir": str(tmp_path)}
    values = values_of(ElasticConfig, folders)
    put(values, "init_from.permuted_parent", written_record(tmp_path / "raw", "parent"))
    with pytest.raises(
        ConfigError, match=r"permuted_parent = .*holds a parent, .* give what recipes/estimate_importance"
    ):
        load_run(ElasticConfig, values, Cluster(), is_main=True)
    put(values, "init_from.permuted_parent", written_record(tmp_path / "permuted"))
    load_run(ElasticConfig, values, Cluster(), is_main=True)
    put(values, "elastic.space.lanes", 4)
    with pytest.raises(ConfigError, match=r"elastic\.space\.lanes = 4: .*; nearest legal value is 8"):
        load_run(ElasticConfig, values, Cluster(), is_main=True)


def test_a_training_run_may_go_on_in_its_folder(tmp_path: Path) -> None:
    values = run_values(PretrainConfig, tmp_path)
    load_run(PretrainConfig, values, Cluster(), is_main=True)
    put(values, "exp_manager.resume_if_exists", False)
    with pytest.raises(ConfigError, match="resume_if_exists=true"):
        load_run(PretrainConfig, values, Cluster(), is_main=True)


def test_data_folder_without_manifest_is_named_when_the_vocabulary_depends_on_it(tmp_path: Path) -> None:
    values = values_of(PretrainConfig, {"data.path": str(tmp_path), "exp_manager.exp_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"model\.vocab = null: .*not a prepared data folder.*set model\.vocab"):
        load_run(PretrainConfig, values, Cluster(), is_main=True)


@pytest.mark.parametrize(
    ("output", "rule"),
    [("", "is a folder"), ("there.json", "exists already"), ("there.json/in/it.json", "there.json is no folder")],
)
def test_a_file_that_cannot_be_written_is_named_before_anything_is_priced(
    tmp_path: Path, output: str, rule: str
) -> None:
    (tmp_path / "there.json").touch()
    config = legal(CostConfig, values_of(CostConfig, {"output": str(tmp_path / output)}))
    (problem,) = output_file_problems(config)
    assert problem.field == "output" and problem.rule.endswith(rule)
    free = replace(config, output=str(tmp_path / "new" / "file.json"))
    assert not [*output_file_problems(free), *output_file_problems(replace(config, output=None))]


def test_prepare_data_rules_come_in_the_same_form(tmp_path: Path) -> None:
    values = {"validation_ratio": 0.9, "vocab_size": 0, "output_dir": str(tmp_path / "data")}
    with pytest.raises(ConfigError) as caught:
        load_run(PrepareConfig, values, Cluster(), is_main=True)
    assert [problem.field for problem in caught.value.problems] == ["validation_ratio", "vocab_size"]
    assert "must be at most 0.5; nearest legal value is 0.5" in str(caught.value)


def tokenizer_of(folder: Path, tokens: list[str]) -> str:
    """Write a word tokenizer into a folder that looks like prepared data; returns the folder."""
    folder.mkdir()
    path = folder / "tokenizer.json"
    Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0])).save(str(path))
    return written_manifest(folder, hashlib.sha256(path.read_bytes()).hexdigest())


TOKENIZED: tuple[tuple[type, str], ...] = (
    (ImportanceConfig, "init_from.parent"),
    (ElasticConfig, "init_from.permuted_parent"),
    (EvaluateConfig, "init_from.checkpoint"),
    (ExtractConfig, "init_from.checkpoint"),
)


@pytest.mark.parametrize("from_import", [False, True])
@pytest.mark.parametrize(("kind", "field"), TOKENIZED)
def test_data_of_another_tokenizer_than_the_checkpoints_is_refused(
    tmp_path: Path, kind: type, field: str, from_import: bool
) -> None:
    own = tokenizer_of(tmp_path / "own", ["<end>", "a", "b"])
    other = tokenizer_of(tmp_path / "other", ["<end>", "b", "a"])
    checkpoint = written_record(tmp_path / "checkpoint", data=None if from_import else own)
    trained_with = Path(own)
    if from_import:
        trained_with = tmp_path / "checkpoint" / "hugging_face"
        shutil.copytree(own, trained_with)
        write_contents(tmp_path / "checkpoint", {})
    changes = {field: checkpoint, "exp_manager.exp_dir": str(tmp_path)}
    load_run(kind, values_of(kind, changes | {"data.path": own}), Cluster(), is_main=True)
    with pytest.raises(ConfigError) as caught:
        load_run(kind, values_of(kind, changes | {"data.path": other}), Cluster(), is_main=True)
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("data.path", other)
    assert problem.rule.startswith("is of another tokenizer than the checkpoint, which was trained with ")
    assert problem.remedy == f"prepare the text with tokenizer_path={trained_with}"


def test_same_tokens_in_a_file_written_differently_are_the_same_tokenizer(tmp_path: Path) -> None:
    own = tokenizer_of(tmp_path / "own", ["<end>", "a", "b"])
    again = tokenizer_of(tmp_path / "again", ["<end>", "a", "b"])
    path = Path(again) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    written_manifest(Path(again), hashlib.sha256(path.read_bytes()).hexdigest())
    changes = {
        "init_from.parent": written_record(tmp_path / "checkpoint", data=own),
        "exp_manager.exp_dir": str(tmp_path),
        "data.path": again,
    }
    load_run(ImportanceConfig, values_of(ImportanceConfig, changes), Cluster(), is_main=True)
    assert Path(own, "tokenizer.json").read_bytes() != path.read_bytes()


def test_data_with_more_tokens_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    data = written_manifest(tmp_path / "data")
    shape = ModelConfig(vocab=DATA_TOKENS - 1).shape()
    (tmp_path / "checkpoint").mkdir()
    Record("parent", shape).write(tmp_path / "checkpoint")
    write_contents(tmp_path / "checkpoint", {})
    changes = {"init_from.parent": str(tmp_path / "checkpoint"), "data.path": data}
    with pytest.raises(ConfigError) as caught:
        load_run(ImportanceConfig, values_of(ImportanceConfig, changes), Cluster(), is_main=False)
    (line,) = [str(problem) for problem in caught.value.problems]
    assert f"its {DATA_TOKENS} tokens do not fit in the vocabulary of the checkpoint = {DATA_TOKENS - 1}" in line
    assert line.endswith("prepare the text with tokenizer_path=the folder of the checkpoint's tokenizer")


def test_names_sizes_and_tokenizer_of_what_is_to_write_are_checked_in_its_files(tmp_path: Path) -> None:
    values = values_of(GenerateConfig, {"budget": "small"})
    put(values, "init_from.checkpoint", str(tmp_path))
    with pytest.raises(ConfigError, match=r"init_from\.checkpoint = .* is neither a checkpoint nor a run folder"):
        load_run(GenerateConfig, values, Cluster(), is_main=True)
    put(values, "init_from.checkpoint", written_record(tmp_path / "family"))
    put(values, "subnets", [{"name": "a", "hidden": 1024}, {"name": "b", "ffn": [100]}, {"name": "c"}])
    put(values, "think", "a")
    put(values, "answer", "d")
    put(values, "parallel.tensor", 3)
    with pytest.raises(ConfigError) as caught:
        load_run(GenerateConfig, values, Cluster(3), is_main=True)
    assert [problem.field for problem in caught.value.problems] == [
        "subnets.1.name", "subnets.2.name", "budget",  # between fields
        "parallel.tensor", "budget", "answer", "subnets.0", "subnets.1.ffn", "tokenizer",  # in the files
    ]  # fmt: skip
    by_field = {problem.field: problem for problem in caught.value.problems}
    assert by_field["answer"].rule == "must be one of a, b, c"
    assert "hidden = 1024 is not within 1..128" in by_field["subnets.0"].rule
    assert "neither carries a tokenizer nor says what data it was trained on" in by_field["tokenizer"].rule
    put(values, "folder", str(tmp_path))
    values["init_from"]["checkpoint"] = values["answer"] = values["think"] = values["budget"] = None
    values |= {"subnets": [], "parallel": {}}
    with pytest.raises(ConfigError, match=r"(?s)folder = .*config\.json is missing"):
        load_run(GenerateConfig, values, Cluster(), is_main=True)


def test_a_name_of_the_hub_is_told_how_to_become_a_folder() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(ImportConfig, {"source": "nvidia/Some-Model_v2.1"}, Cluster(), is_main=True)
    (problem,) = caught.value.problems
    assert (problem.field, problem.rule) == ("source", "does not exist")
    assert problem.remedy.endswith("hf download nvidia/Some-Model_v2.1 --local-dir Some-Model_v2.1")
