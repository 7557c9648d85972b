"""The run folder and its logs: what may be gone on with, what is never removed, and disks that refuse."""

import json
import os
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from elastic.checkpoint.record import Record, RecordError
from elastic.config.load import ConfigError, load
from elastic.config.rules_layout import Cluster, check_exp_manager
from elastic.config.sections import ExpManagerConfig
from elastic.config.verbs import ElasticConfig, EvaluateConfig, ExtractConfig, ImportConfig, SearchConfig
from elastic.run import folder as folder_module
from elastic.run.folder import RunFolderError, is_left_over, open_run_folder, prepare_run_folder
from elastic.space.cost import Budget, Metric
from elastic.train.log import LogError, RunLog, open_wandb
from elastic.verbs.inputs import load_run
from elastic.world.groups import SharedFileError, decided_by_rank_0
from tests.unit.config.configs import put, values_of, written_record


def test_a_run_that_was_killed_before_its_first_checkpoint_is_unfinished(tmp_path: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "events.jsonl"):
        (tmp_path / name).touch()
    for name in ("tensorboard", "wandb", "checkpoints", "watchdog", "nonfinite"):
        (tmp_path / name).mkdir()
    assert is_left_over(tmp_path, resume=True)
    (tmp_path / "extraction.json").touch()
    assert not is_left_over(tmp_path, resume=True)


@pytest.mark.parametrize("below", ["", "checkpoints/step_00000003", "thin_megatron"])
def test_overwriting_never_removes_the_verbs_own_input(tmp_path: Path, below: str) -> None:
    run = tmp_path / "name" / "version_0"
    run.mkdir(parents=True)
    (run / below).parent.mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(run)
    if below:
        written_record(run / below)
    places = {"exp_manager.exp_dir": str(tmp_path), "exp_manager.name": "name", "exp_manager.overwrite": True}
    values = values_of(ExtractConfig, places)
    put(values, "init_from.checkpoint", str(tmp_path / "link" / below))
    with pytest.raises(ConfigError) as caught:
        load_run(ExtractConfig, values, Cluster(), is_main=True)
    problem = next(problem for problem in caught.value.problems if problem.field == "exp_manager.overwrite")
    assert problem.rule.startswith("would remove init_from.checkpoint = ")
    assert problem.remedy == "set exp_manager.version=version_1"


@pytest.mark.parametrize("field", ["subnets", "elastic.deployment.latency"])
def test_overwriting_never_removes_a_file_whose_content_is_read(tmp_path: Path, field: str) -> None:
    """The config holds what it says by then."""
    kind = SearchConfig if field == "subnets" else ElasticConfig
    run = tmp_path / "name" / "version_0"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"exp_manager": {}}')
    values = values_of(kind, {"exp_manager.exp_dir": str(tmp_path), "exp_manager.name": "name"})
    put(values, "exp_manager.overwrite", True)
    put(values, field, str(run / "given.json"))
    (run / "given.json").write_text(json.dumps({"subnets": []}))
    with pytest.raises(ConfigError) as caught:
        load_run(kind, values, Cluster(), is_main=True)
    assert any(
        p.rule == f"would remove {field} = {run / 'given.json'}, which this verb reads" for p in caught.value.problems
    )


def test_a_source_beside_the_run_folder_may_stay_while_it_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "name" / "version_0_source").mkdir(parents=True)
    values = values_of(ImportConfig, {"exp_manager.exp_dir": str(tmp_path), "exp_manager.name": "name"})
    put(values, "source", str(tmp_path / "name" / "version_0_source"))
    put(values, "exp_manager.overwrite", True)
    load_run(ImportConfig, values, Cluster(), is_main=True)


def test_a_log_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    log = RunLog(tmp_path, tensorboard=False)
    for write in (lambda: log.write(1, {"loss": 1.0}), lambda: log.event("spike", 1, {})):
        with pytest.raises(LogError, match=r"(metrics|events)\.jsonl: No space left on device.*free space there"):
            write()
    with pytest.raises(LogError, match=r"nowhere/metrics\.jsonl: No such file"):
        RunLog(tmp_path / "nowhere", tensorboard=False)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = replace(ExpManagerConfig(), exp_dir=str(tmp_path / "file"))
    with pytest.raises(SharedFileError, match=r"file/.*: Not a directory"):
        decided_by_rank_0(lambda: prepare_run_folder(settings, {}), None)


@pytest.mark.parametrize("name", ["../planted", "/srv/planted", "a/b", "", ".hidden", "a b", "x" * 101])
def test_a_name_that_leads_elsewhere_is_no_budget(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="it names a folder, too: letters" if name else "name = null: missing"):
        load(Budget, {"name": name, "target": 1.0})
    for fine in ("12b", "_x", "9b-think", "v1.2+a", "\u00e4"):
        assert load(Budget, {"name": fine, "target": 1.0}).name == fine


def test_a_record_with_such_a_name_is_refused(tmp_path: Path) -> None:
    from elastic.checkpoint.record import Family
    from elastic.space.axes import Axis
    from elastic.space.cost import Deployment
    from elastic.space.space import AxisChoices

    family = Family({Axis.HIDDEN: AxisChoices((64,))}, (Budget("half", Metric.PARAMS, 1.0),), Deployment(), 16)
    checkpoint = Path(written_record(tmp_path / "checkpoint", family=family))
    assert Record.read(checkpoint).family is not None
    record = checkpoint / "record.json"
    record.write_text(record.read_text().replace('"half"', '"../../half"'))
    with pytest.raises(RecordError, match="it names a folder, too: letters"):
        Record.read(checkpoint)


def test_a_data_path_that_prepare_data_did_not_write_is_named_before_a_run(tmp_path: Path) -> None:
    from elastic.verbs.text import length_problems

    config = load(ElasticConfig, values_of(ElasticConfig, {"data.path": str(tmp_path)}))
    (problem,) = length_problems(config)
    assert problem.field == "data.path" and "is not a prepared data folder" in problem.rule
    (tmp_path / "pair.idx").touch()
    (problem,) = length_problems(config)
    assert str(problem).endswith(f"set data.blend='[{{path: {tmp_path}, weight: 1, tokenizer: FOLDER}}]' instead")


def test_validation_sequences_must_be_there_at_every_length(tmp_path: Path) -> None:
    from elastic.data.manifest import Manifest, SplitRecord, TokenizerRecord
    from elastic.verbs.text import length_problems

    tokenizer = TokenizerRecord(vocab_size=300, eos_token="<end>", eos_id=0, trained=True, sha256="")
    splits = {"validation": SplitRecord(1, 100 * 64 + 1, 1, {}), "test": SplitRecord(1, 5 * 64 + 1, 1, {})}
    (tmp_path / "data").mkdir()
    Manifest({}, {}, 1, {}, False, "", tokenizer, "uint16", splits).write(tmp_path / "data")
    lengths = {"curriculum.0.sequence_length": 32, "curriculum.1.sequence_length": 64}
    values = values_of(ElasticConfig, lengths | {"data.path": str(tmp_path / "data"), "data.validation_sequences": 100})
    assert list(length_problems(load(ElasticConfig, values))) == []
    put(values, "data.validation_sequences", 104)
    (problem,) = length_problems(load(ElasticConfig, values))
    assert str(problem) == (
        "data.validation_sequences = 104: phase long: the held-out split has 100 sequences of 64 tokens; nearest legal "
        "value is 100"
    )
    tested = {"data.path": str(tmp_path / "data"), "sequence_length": 64, "data.validation_sequences": 6}
    assert list(length_problems(load(EvaluateConfig, values_of(EvaluateConfig, tested)))) == []
    (problem,) = length_problems(load(EvaluateConfig, values_of(EvaluateConfig, tested | {"data.split": "test"})))
    assert "the test split has 5 sequences of 64 tokens; nearest legal value is 5" in str(problem)


@pytest.mark.parametrize("version", ["../../x", "a\nb", "a/b", "/srv/x", ".."])
@pytest.mark.parametrize("field", ["name", "version"])
def test_a_run_does_not_leave_its_exp_dir(field: str, version: str) -> None:
    values = values_of(ExtractConfig, {f"exp_manager.{field}": version})
    with pytest.raises(ConfigError, match="it names a folder, too") as caught:
        load(ExtractConfig, values)
    assert caught.value.problems[0].field == f"exp_manager.{field}"


def test_what_a_refused_start_left_does_not_block_the_corrected_command(tmp_path: Path) -> None:
    settings = replace(ExpManagerConfig(), exp_dir=str(tmp_path))
    with open_run_folder(settings, {"budget_names": ["nope"]}, None) as folder:
        pass
    (folder / ".config.json.partial-0123").touch()  # of a kill
    prepare_run_folder(settings, {"budget_names": ["half"]})
    assert json.loads((folder / "config.json").read_text()) == {"budget_names": ["half"]}
    (folder / "evaluation.json").touch()
    with pytest.raises(RunFolderError, match="exists already"):
        prepare_run_folder(settings, {})


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_starts_at_once_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Also while the first has written no more than a refused start leaves."""
    monkeypatch.setattr(folder_module, "LOCK_WAIT_S", 0.1)
    settings = replace(ExpManagerConfig(), exp_dir=str(tmp_path))
    with open_run_folder(settings, {"of": "first"}, None) as folder:
        second = replace(settings, overwrite=overwrite)
        refused = pytest.raises(RunFolderError, match=rf"another run writes there \(process {os.getpid()} on ")
        with refused, open_run_folder(second, {"of": "second"}, None):
            pass
        assert json.loads((folder / "config.json").read_text()) == {"of": "first"}
    with open_run_folder(settings, {"of": "second"}, None):
        assert json.loads((folder / "config.json").read_text()) == {"of": "second"}


def logged(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines() if line.startswith("{")]


def test_a_resumed_run_logs_each_step_once(tmp_path: Path) -> None:
    """Killed after step 5, resumed from the checkpoint of step 3: in the files, and in what TensorBoard shows."""
    log = RunLog(tmp_path, tensorboard=True)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
        log.event("loss_spike", step, {})
        log.choices(step, {})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write('a note of the user\n{"step": 6, "lo')  # and a line that the kill cut off
    heard: list[str] = []
    log = RunLog(tmp_path, tensorboard=True, step=3, say=heard.append)
    assert logged(tmp_path) == logged(tmp_path, "events.jsonl") == logged(tmp_path, "choices.jsonl") == [1, 2, 3]
    assert (log.num_events("loss_spike"), log.num_events("loss")) == (3, 0)
    assert "a note of the user\n" in (tmp_path / "metrics.jsonl").read_text()
    assert heard[0] == "metrics.jsonl: 3 lines of steps after 3 are dropped, for these steps run again"
    for step in range(4, 8):
        log.write(step, {"loss": step * 10.0})
    log.close()
    assert logged(tmp_path) == list(range(1, 8)) and not list(tmp_path.glob(".*"))
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0), (7, 70.0)
    ]  # fmt: skip


def test_a_resumed_run_is_the_same_run_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    module: Any = ModuleType("wandb")
    module.init = lambda **given: calls.append(given)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        open_wandb(tmp_path, "elastic", "version_0", {"seed": 1})
    open_wandb(tmp_path.parent, "elastic", "version_1", {})
    first, resumed, other = calls
    assert first == resumed and first["resume"] == "allow" and len(first["id"]) == 32
    assert other["id"] != first["id"] and is_left_over(tmp_path, resume=True)


def test_wandb_is_missed_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = load(ElasticConfig, values_of(ElasticConfig, {"exp_manager.create_wandb_logger": True}))
    (problem,) = check_exp_manager(config.exp_manager, config.trainer, config)
    assert problem.field == "exp_manager.create_wandb_logger" and "[wandb]" in problem.remedy
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert [text.partition(">")[0] for text in project["optional-dependencies"]["wandb"]] == ["wandb"]


@pytest.mark.parametrize(
    ("name", "rule", "remedy"),
    [
        ("curriculum.0.lr", "is a section", "name its fields: curriculum.0.lr.min, curriculum.0.lr.peak"),
        ("optim", "is a section", "name its fields: optim.adam_beta1, "),
        ("curriculum.0.lr.paek", "is no field", "nearest legal name is curriculum.lr.peak"),
        ("nonsense", "is no field of this config", "nearest legal name is "),
    ],
)
def test_only_fields_can_be_accepted_by_name(name: str, rule: str, remedy: str) -> None:
    config = load(ElasticConfig, values_of(ElasticConfig, {"exp_manager.accept_changes": [name]}))
    (problem,) = check_exp_manager(config.exp_manager, config.trainer, config)
    assert problem.value == name and rule in problem.rule and remedy in problem.remedy


def test_what_a_refusal_offers_to_accept_is_accepted() -> None:
    offered = ["curriculum.0.lr.peak", "curriculum.2", "elastic.budgets", "elastic.router.draws_per_step",
               "curriculum.0.budget_weights.half", "distill.temperature", "curriculum.1.steps"]  # fmt: skip
    config = load(ElasticConfig, values_of(ElasticConfig, {"exp_manager.accept_changes": offered}))
    assert list(check_exp_manager(config.exp_manager, config.trainer, config)) == []
