"""No verb writes over an existing run, export, checkpoint or report unless it is told to."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from elastic.config.latency import LatencyConfig
from elastic.config.load import load
from elastic.config.sections import ExpManagerConfig
from elastic.config.tasks import EvaluateTasksConfig
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
from elastic.corpus.prepare import prepare
from elastic.data.manifest import DataError
from elastic.plan.config import PlanConfig
from elastic.plan.run_plan import run_plan
from elastic.run.changes import ResumeError
from elastic.run.folder import RunFolderError, prepare_run_folder
from elastic.verbs.cost import run_cost
from elastic.verbs.estimate_importance import run_importance
from elastic.verbs.evaluate import run_evaluate
from elastic.verbs.evaluate_tasks import run_evaluate_tasks
from elastic.verbs.extract import run_extract
from elastic.verbs.generate import run_generate
from elastic.verbs.import_hf import run_import
from elastic.verbs.measure_latency import run_measure_latency
from elastic.verbs.report_file import OutputError
from elastic.verbs.training import run_training
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.made_tasks import write_tasks
from tests.distributed.training import BUDGETS, MODEL, SPACE, elastic_values
from tests.parity.hf_models import tiny
from tests.parity.import_extract import stock_folder

ROOT = Path(__file__).parents[2]


def prepare_data(start, target):
    prepare(PrepareConfig(output_dir=str(target), paths=[str(start / "corpus")], suffixes=[".txt"], vocab_size=300))


def values_of(start, verb, target):
    """Return legal values of a verb that writes into `target`, an existing folder."""
    parent, permuted = str(start / "run" / "parent"), str(start / "run" / "permuted")
    data = dict(path=str(start / "data"))
    given = {
        "pretrain_parent": dict(model=MODEL, data=data),
        "train_elastic": {**elastic_values(start, "unused"), "exp_manager": {}},
        "estimate_importance": dict(init_from=dict(parent=parent), data=data),
        "evaluate": dict(init_from=dict(checkpoint=permuted), data=data, sequence_length=32),
        "evaluate_tasks": dict(
            init_from=dict(checkpoint=permuted), tasks=["made_choices"], include_path=str(write_tasks(start / "tasks"))
        ),
        "generate": dict(init_from=dict(checkpoint=permuted), prompts=["the"]),
        "extract": dict(init_from=dict(checkpoint=permuted)),
        "import_hf": dict(source=str(start / "stock")),
        "cost": dict(model=MODEL, elastic=dict(space=SPACE, budgets=BUDGETS)),
        "measure_latency": dict(model=MODEL, elastic=dict(space=SPACE)),
        "plan": dict(model=MODEL, elastic=dict(space=SPACE, budgets=BUDGETS)),
    }[verb]
    if verb in ("cost", "measure_latency", "plan", "generate"):
        return dict(given, output=str(target / "precious.json"))
    return dict(
        given, exp_manager=dict(exp_dir=str(target.parent.parent), name=target.parent.name, version=target.name)
    )


VERBS = {
    "pretrain_parent": (PretrainConfig, run_training, RunFolderError),
    "train_elastic": (ElasticConfig, run_training, RunFolderError),
    "estimate_importance": (ImportanceConfig, run_importance, RunFolderError),
    "evaluate": (EvaluateConfig, run_evaluate, RunFolderError),
    "evaluate_tasks": (EvaluateTasksConfig, run_evaluate_tasks, RunFolderError),
    "generate": (GenerateConfig, run_generate, OutputError),
    "extract": (ExtractConfig, run_extract, RunFolderError),
    "import_hf": (ImportConfig, run_import, RunFolderError),
    "cost": (CostConfig, run_cost, OutputError),
    "measure_latency": (LatencyConfig, run_measure_latency, OutputError),
    "plan": (PlanConfig, run_plan, OutputError),
}


def refusals(start, folder):
    """Call every verb on a folder that holds something; return what each raised."""
    stock_folder(start / "stock", tiny("M-*-"), "fp32") if not (start / "stock").exists() else None
    raised = {}
    for verb, (kind, function, expected) in VERBS.items():
        target = folder / "name" / verb
        target.mkdir(parents=True)
        (target / "precious.json").write_text("results of a week")
        with pytest.raises(expected) as refused:
            function(load(kind, values_of(start, verb, target)), Console(quiet=True))
        raised[verb] = str(refused.value)
        assert [path.name for path in target.iterdir()] == ["precious.json"], verb
        assert (target / "precious.json").read_text() == "results of a week"
    target = folder / "name" / "prepare_data"
    target.mkdir()
    (target / "precious.json").write_text("results of a week")
    with pytest.raises(DataError) as refused:
        prepare_data(start, target)
    assert [path.name for path in target.iterdir()] == ["precious.json"]
    return {**raised, "prepare_data": str(refused.value)}


@pytest.fixture(scope="module")
def raised(start, tmp_path_factory):
    return run_distributed(refusals, 1, start, tmp_path_factory.mktemp("existing"))[0]


# They keep to folders of their own, write nothing, or only the page that they wrote before; search needs a family, so
# its refusal stands in test_search.py.
NO_VERBS = ("smoke", "smoke_chat", "benchmark", "chaos", "preflight", "report", "search", "study")
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py") if path.stem not in NO_VERBS)


@pytest.mark.parametrize("verb", RECIPES)
def test_a_verb_refuses_a_place_that_holds_something_and_names_the_way_out(raised, verb):
    assert "exists already" in raised[verb] or "is not replaced" in raised[verb]
    assert "overwrite=true" in raised[verb] and "choose another" in raised[verb].lower()


def train_into(values):
    run_training(load(ElasticConfig, values), Console(quiet=True))


def test_training_does_not_go_on_from_what_another_verb_wrote(start):
    before = sorted(path for path in (start / "run" / "permuted").rglob("*"))
    with pytest.raises(DistributedRunError, match="a permuted_parent that no training run wrote") as refused:
        run_distributed(train_into, 1, elastic_values(start, "permuted"))
    assert isinstance(refused.value.__cause__, ResumeError)
    with pytest.raises(DistributedRunError, match="another verb wrote this checkpoint"):
        run_distributed(train_into, 1, elastic_values(start, "parent"))
    assert sorted(path for path in (start / "run" / "permuted").rglob("*")) == before


def test_told_to_a_verb_replaces_the_whole_folder_of_a_run_and_no_other(tmp_path):
    settings = ExpManagerConfig(exp_dir=str(tmp_path), name="name", version="v")
    old = tmp_path / "name" / "v" / "old.json"
    old.parent.mkdir(parents=True)
    old.touch()
    with pytest.raises(RunFolderError, match=r"overwrite=true to replace it"):
        prepare_run_folder(settings, {})
    overwriting = replace(settings, overwrite=True)
    for foreign in (None, "{}", '{"model_type": "nemotron_h"}', "[", '{"exp_manager": NaN}'):
        if foreign is not None:
            (old.parent / "config.json").write_text(foreign)
        with pytest.raises(RunFolderError, match="replaces runs alone"):
            prepare_run_folder(overwriting, {})
        assert old.exists()
    (old.parent / "config.json").write_text('{"exp_manager": {}}')
    (left := tmp_path / "name" / ".v.removing").mkdir()  # by one that was killed in it
    (left / "small").touch()
    prepare_run_folder(overwriting, {})
    assert not left.exists() and [path.name for path in old.parent.iterdir()] == ["config.json"]
