"""The verb evaluate_tasks on a tiny family: of each budget the numbers that lm-eval's own `hf` finds on its export."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elastic.config.load import ConfigError, load
from elastic.config.rules_layout import Cluster
from elastic.config.tasks import INSTALL, EvaluateTasksConfig
from elastic.config.verbs import ExtractConfig
from elastic.verbs.evaluate_tasks import (
    PICTURE_FILE,
    TASKS_FILE,
    TasksError,
    headline,
    run_evaluate_tasks,
    scores_table,
)
from elastic.verbs.extract import run_extract
from elastic.verbs.inputs import load_run
from elastic.world.groups import Layout, world
from recipes._tiny_family import prepare_corpus
from tests.distributed.harness import run_distributed
from tests.distributed.made_tasks import BODIES, COMMON, TASKS, WORDS, write_tasks
from tests.distributed.test_generate_verb import save_lively_family
from tests.distributed.training import place, write_corpus
from tests.parity.model_factory import relative_error

BUDGETS = ("full", "half")
LONGEST = 40  # tokens; some texts are longer, so that windows and truncation are compared, too


def evaluated(start: Path, version: str, **values: Any) -> list[dict[str, Any]]:
    """Run the verb as its recipe does; returns the rows of tasks.json."""
    given = dict(tasks=TASKS, include_path=str(start / "tasks"), max_length=LONGEST, exp_manager=place(start, version))
    config = load_run(EvaluateTasksConfig, given | values, Cluster(), is_main=True)
    folder = run_evaluate_tasks(config, Console(quiet=True))
    assert (folder / PICTURE_FILE).stat().st_size > 10_000
    rows: list[dict[str, Any]] = json.loads((folder / TASKS_FILE).read_text())["members"]
    return rows


def answers(start: Path) -> dict[str, Any]:
    """Ask a subnet and stock transformers' model of its export the same requests, directly, in batches of two sizes."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from elastic.config.inputs import ServedInput
    from elastic.tasks.language_model import Limits, NestedLM, RequestError
    from elastic.verbs.members import open_checkpoint

    draw = random.Random(5)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    questions = ["", *(words(1, 30) for _ in range(6))]
    pairs = [(question, f" {words(1, 5)}") for question in questions for _ in range(2)]
    settings = [{"until": ["e"], "max_gen_toks": 9}, {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}]

    def asked(of: Any) -> dict[str, Any]:
        def requests(kind: str, each: list[Any]) -> list[Any]:
            return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(each)]

        texts = [(question, settings[number % 2]) for number, question in enumerate(questions) if question]
        return {
            "pairs": of.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
            "rolling": of.loglikelihood_rolling(requests("loglikelihood_rolling", [(q,) for q in questions if q])),
            "texts": of.generate_until(requests("generate_until", texts), disable_tqdm=True),
        }

    found = {}
    with world(Layout()) as here:
        source = ServedInput(checkpoint=str(start / "run" / "writer"))
        opened = open_checkpoint(source, ["half"], (), world=here)
        model = opened.load_model(here.layout).eval()
        tokenizer = AutoTokenizer.from_pretrained(str(start / "data"))
        ends = frozenset((tokenizer.eos_token_id,))
        for batch in (1, 5):
            limits = Limits(LONGEST, batch, ends, tuple(range(len(tokenizer), opened.space.parent.vocab)))
            found[f"nested {batch}"] = asked(NestedLM(model, opened.members[0].subnet, tokenizer, limits))
        folder = str(start / "run" / "written" / "half")
        stock = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1, max_length=LONGEST)
        found["hf"] = asked(stock)
        short = NestedLM(model, opened.members[0].subnet, tokenizer, Limits(4, 2, ends))
        with pytest.raises(RequestError, match=r"max_length = 4: .* set it higher"):
            short.loglikelihood([Instance("loglikelihood", {}, ("the", " small" * 9), 0)])
        with pytest.raises(RequestError, match=r"max_length = 4: .* set it above 4"):
            short.generate_until([Instance("generate_until", {}, ("the", {"max_gen_toks": 4}), 0)])
    return found


def _make_family(start: Path) -> None:
    write_corpus(start / "corpus")
    prepare_corpus(start)
    save_lively_family(start)
    write_tasks(start / "tasks")


def _on_one_process(start: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ["HF_DATASETS_CACHE"] = str(start / "datasets")  # before its package is imported
    _make_family(start)
    source = dict(init_from=dict(checkpoint=str(start / "run" / "writer")))
    run_extract(load(ExtractConfig, source | dict(exp_manager=place(start, "written"))), Console(quiet=True))
    folder = str(start / "run" / "written" / "half")
    with pytest.raises(TasksError) as unknown:
        evaluated(start, "unknown", **source, tasks=["made_choice"])
    (start / "tasks" / "gone.yaml").write_text(
        COMMON.format(name="gone", data=start / "nowhere.jsonl") + BODIES[TASKS[0]]
    )
    with pytest.raises(TasksError, match=r'tasks\.0 = "gone": cannot be asked: FileNotFoundError: '):
        evaluated(start, "unknown", **source, tasks=["gone"])
    with pytest.raises(TasksError, match=r'tasks\.1 = "made_texts": cannot be asked: '):
        evaluated(start, "unknown", **source, tasks=["made_answers", "made_texts"], num_fewshot=1000)
    assert not (start / "run" / "unknown").exists(), "nothing has been written"
    with pytest.raises(TasksError, match=r"latency_ms\.haf = 2\.5: names none of the members; they are full, half"):
        evaluated(start, "no_member", **source, latency_ms={"haf": 2.5})
    with pytest.raises(ConfigError, match=r"chat_template = true: tokenizer .*data has no chat template"):
        evaluated(start, "no_template", **source, chat_template=True)
    return {
        "nested": evaluated(start, "nested", **source, latency_ms={"half": 2.5}, batch_size=5),
        "folder": evaluated(start, "folder", folder=folder, batch_size=3),
        "thin": evaluated(start, "thin", **source, budget_names=[], limit=3, tasks=["made_choices"],
                          subnets=[dict(name="thin", hidden=32, ffn=[64], kept_layers=[0, 1, 2])]),
        "unknown": str(unknown.value),
        "answers": answers(start),
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    start = tmp_path_factory.mktemp("tasks")
    (found,) = run_distributed(_on_one_process, 1, start)
    return found


def test_numbers_from_the_nested_checkpoint_are_those_of_lm_evals_own_hf_on_the_export(done: dict[str, Any]) -> None:
    (exported,), nested = done["folder"], {row["name"]: row for row in done["nested"]}
    ours, stock = nested["half"]["tasks"], exported["tasks"]
    assert ours.keys() == stock.keys() == set(TASKS)
    counted = [(task, name) for task in TASKS for name in stock[task] if name.startswith(("acc", "exact_match"))]
    assert len(counted) >= 6, "accuracies and their errors"
    for task, name in counted:
        assert ours[task][name] == stock[task][name], (task, name)
    for task, name in (("made_texts", "word_perplexity"), ("made_texts", "bits_per_byte"), ("made_last", "perplexity")):
        assert abs(ours[task][f"{name},none"] / stock[task][f"{name},none"] - 1) < 1e-4
    full = nested["full"]["tasks"]
    assert 0 < ours["made_letters"]["acc,none"] < 1
    assert full["made_texts"] != ours["made_texts"], "another budget is another model"


def test_answers_do_not_depend_on_batches_and_are_stock_ones(done: dict[str, Any]) -> None:
    found = done["answers"]
    expected = found["hf"]
    for name in ("nested 1", "nested 5"):
        scores, greedy = zip(*found[name]["pairs"], strict=True)
        stock_scores, stock_greedy = zip(*expected["pairs"], strict=True)
        assert greedy == stock_greedy
        assert relative_error(torch.tensor(scores), torch.tensor(stock_scores)) < 1e-5
        assert relative_error(torch.tensor(found[name]["rolling"]), torch.tensor(expected["rolling"])) < 1e-5
        assert found[name]["texts"] == expected["texts"]
    assert len(set(expected["texts"])) > 2 and any(len(text) > 3 for text in expected["texts"])


def _of_file(start: Path, ranks: int) -> list[dict[str, Any]]:
    """Score a budget and an entry of a file of subnets on tensor-parallel ranks; one of them makes the family first."""
    os.environ["HF_DATASETS_CACHE"] = str(start / "datasets")
    if ranks == 1:
        _make_family(start)
    given = dict(init_from=dict(checkpoint=str(start / "run" / "writer")), parallel=dict(tensor=ranks), limit=6,
                 tasks=TASKS, include_path=str(start / "tasks"), max_length=LONGEST, budget_names=["half", "thin"],
                 subnets=str(start / "thin.json"), exp_manager=place(start, f"on_{ranks}"))  # fmt: skip
    config = load_run(EvaluateTasksConfig, given, Cluster(num_processes=ranks), is_main=False)
    folder, is_main = run_evaluate_tasks(config, Console(quiet=True)), os.environ["RANK"] == "0"
    rows: list[dict[str, Any]] = json.loads((folder / TASKS_FILE).read_text())["members"] if is_main else []
    return rows


@pytest.mark.slow
def test_split_over_ranks_and_of_a_file_of_subnets_the_numbers_are_the_same(tmp_path: Path) -> None:
    thin = dict(name="thin", hidden=32, ffn=[64], kept_layers=[0, 1, 2])
    (tmp_path / "thin.json").write_text(json.dumps({"subnets": [thin, dict(name="other")]}))
    whole, split = (run_distributed(_of_file, ranks, tmp_path, ranks, timeout_s=900)[0] for ranks in (1, 2))
    assert [row["name"] for row in split] == ["half", "thin"] == [row["name"] for row in whole]
    for one, other in zip(split, whole, strict=True):
        for task, metrics in one["tasks"].items():
            assert metrics.keys() == other["tasks"][task].keys()
            for name, value in metrics.items():  # some are words
                expected = other["tasks"][task][name]
                assert value == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-4)), name


def test_tables_names_and_subnets_by_hand(done: dict[str, Any]) -> None:
    rows = done["nested"]
    assert [(row["name"], row["latency_ms"]) for row in rows] == [("full", None), ("half", 2.5)]
    assert rows[1]["params"] != rows[0]["params"] and rows[1]["subnet"] != rows[0]["subnet"]
    screen = io.StringIO()
    Console(file=screen, width=200).print(scores_table(rows))
    assert all(word in screen.getvalue() for word in ("half", "2.500", "made_choices acc", "±"))
    (thin,) = done["thin"]
    assert (thin["name"], list(thin["tasks"])) == ("thin", ["made_choices"])
    assert (
        'tasks.0 = "made_choice": is no task of lm-eval or of include_path; nearest is made_choice' in done["unknown"]
    )


def test_a_headline_is_the_accuracy_or_the_first_number() -> None:
    assert headline({"acc_norm,none": 0.5, "acc,none": 0.25, "acc_stderr,none": 0.1}) == ("acc", 0.25, 0.1)
    assert headline({"word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A"}) == (
        "word_perplexity",
        9.0,
        None,
    )


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import elastic.config.tasks as tasks

    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        load_run(EvaluateTasksConfig, dict(tasks=["mine"], folder="."), Cluster(), is_main=False)
    lines = [str(problem) for problem in caught.value.problems if problem.field == "tasks"]
    assert lines == [f'tasks = ["mine"]: the package lm-eval is not installed; {INSTALL}']
