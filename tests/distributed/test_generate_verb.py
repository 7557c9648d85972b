"""The verb generate on a tiny family: budgets, phases, an exported folder, two ranks; against stock transformers."""

import io
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic.checkpoint.find import checkpoint_folder
from elastic.checkpoint.record import Family, Record
from elastic.checkpoint.state import Trainable, begin_save
from elastic.config.load import load
from elastic.config.rules_layout import Cluster
from elastic.config.verbs import ExtractConfig, GenerateConfig
from elastic.model.backends import Kernels
from elastic.router.router import Router
from elastic.space.cost import Budget, Deployment, Metric
from elastic.verbs.extract import run_extract
from elastic.verbs.generate import CONTROL_CODES, run_generate
from elastic.verbs.inputs import load_run
from elastic.world.groups import Layout, world
from recipes._tiny_family import prepare_corpus
from tests.distributed.harness import run_distributed
from tests.distributed.training import place, tiny_run_space, write_corpus
from tests.parity.model_factory import build_lively

PROMPTS = ["the small model", "head", "width of the layer\n\u00e4 forgets and"]
NEW_TOKENS, THINK_TOKENS = 20, 6
DRAWN = dict(budget="half", temperature=1.2, top_k=50, top_p=0.9, seed=3, prompts=["the", "the"])
THIN = [dict(name="thin", hidden=32, ffn=[64], kept_layers=[0, 1, 2])]


@dataclass(frozen=True)
class Written:
    """One run of the verb: the rows of its output and what the console showed."""

    rows: list[dict[str, Any]]
    screen: str

    @property
    def tokens(self) -> list[list[int]]:
        return [row["tokens"] for row in self.rows]


def write(start: Path, version: str, processes: int = 1, **values: Any) -> Written:
    """Run the verb on this rank as its recipe does, from the family unless a folder is given."""
    source = {} if "folder" in values else dict(init_from=dict(checkpoint=str(start / "run" / "writer")))
    output = start / "texts" / f"{version}.json"
    common = dict(prompts=PROMPTS, max_new_tokens=NEW_TOKENS, output=str(output))
    screen = io.StringIO()
    config = load_run(GenerateConfig, {**common, **source, **values}, Cluster(processes), is_main=False)
    run_generate(config, Console(file=screen, width=200))
    is_writer = not dist.is_initialized() or dist.get_rank() == 0  # another rank would look before the file is there
    return Written(json.loads(output.read_text())["texts"] if is_writer else [], screen.getvalue())


def save_lively_family(start: Path) -> None:
    """Save a family whose every weight matters: a few steps of training would leave one that repeats one word."""
    # Attention is ranked first: stock transformers' cache needs a layer of it.
    space, names = replace(tiny_run_space(), depth_ranking=(3, 0, 1, 2, 4)), ("full", "half")
    budgets = tuple(Budget(name, Metric.PARAMS, 1e6) for name in names)
    family = Family(space.axes, budgets, Deployment(), router_width=16)
    record = Record("elastic", space.parent, space.lanes, space.depth_ranking, str(start / "data"), family)
    with world(Layout()) as here:
        trained = Trainable(build_lively(space, kernels=Kernels.choose()), router=Router(space, 2, 16, seed=1))
        begin_save(checkpoint_folder(start / "run" / "writer", 1), trained, record, None, here).finish()


def printed_twice(start: Path) -> list[str]:
    """Print the same text twice, as the same command does, and return what was shown and what it left."""
    shown, before = [], sorted(start.rglob("*"))
    for _ in range(2):
        screen = io.StringIO()
        source = dict(init_from=dict(checkpoint=str(start / "run" / "writer")), budget="half")
        config = load_run(GenerateConfig, dict(source, prompts=["the"], max_new_tokens=3), Cluster(), is_main=True)
        run_generate(config, Console(file=screen, width=200))
        shown.append(re.sub(r"[\d.,]+/s", "", screen.getvalue()))
    return [*shown, *(str(path) for path in sorted(start.rglob("*")) if path not in before)]


def folder_with_more_ends(start: Path, token: int) -> Path:
    """Copy an exported folder, and let its generation config, as published ones do, name more ends than its config."""
    folder = start / "run" / "ends"
    shutil.copytree(start / "run" / "written" / "full", folder)
    path = folder / "generation_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"eos_token_id": [content["eos_token_id"], token]}))
    return folder


def _on_one_process(start: Path) -> dict[str, Any]:
    """Make a family, export it, and run the verb in all its ways; one process, so that its imports happen once."""
    write_corpus(start / "corpus")
    prepare_corpus(start)
    save_lively_family(start)
    family = dict(init_from=dict(checkpoint=str(start / "run" / "writer")), exp_manager=place(start, "written"))
    run_extract(load(ExtractConfig, family), Console(quiet=True))
    (start / "prompt.txt").write_text(PROMPTS[0])
    done: dict[str, Any] = {
        "full": write(start, "full", budget="full"),
        "half": write(start, "half", budget="half"),
        "full folder": write(start, "full_folder", folder=str(start / "run" / "written" / "full")),
        "half folder": write(start, "half_folder", folder=str(start / "run" / "written" / "half")),
        "whole": write(start, "whole"),
        "drawn": write(start, "drawn", **DRAWN),
        "escaped": write(start, "escaped", budget="half", prompts=["the\\nsmall\\\\n", "the\nsmall\\\\n"]),
        "printed twice": printed_twice(start),
        "thin": write(start, "thin", budget="thin", subnets=THIN, prompts=[], prompt_file=str(start / "prompt.txt")),
        "forced": write(start, "forced", think="half", answer="full", max_think_tokens=THINK_TOKENS),
    }
    done["ends"] = write(start, "ends", folder=str(folder_with_more_ends(start, done["full"].rows[0]["tokens"][5])))
    letters = re.search("[ -~]{3}", done["half"].rows[0]["text"])
    assert letters is not None, "other weights: no three plain letters come in a row"
    natural = dict(think="half", answer="full", max_think_tokens=NEW_TOKENS - 1, prompts=PROMPTS[:1])
    return done | {"marker": letters[0], "natural": write(start, "natural", marker=letters[0], **natural)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def done(start: Path) -> dict[str, Any]:
    (done,) = run_distributed(_on_one_process, 1, start)
    return done


def stock_tokens(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Let stock transformers go on greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    tokens: list[int] = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens
    )[0].tolist()
    return tokens[len(prompt) :]


@pytest.mark.parametrize("budget", ["full", "half"])
def test_budget_and_exported_folder_write_what_stock_transformers_writes(
    budget: str, start: Path, done: dict[str, Any]
) -> None:
    nested, exported = done[budget], done[f"{budget} folder"]
    tokenizer = AutoTokenizer.from_pretrained(start / "run" / "written" / budget)
    for row, other, prompt in zip(nested.rows, exported.rows, PROMPTS, strict=True):
        assert row["prompt_tokens"] == other["prompt_tokens"] == tokenizer(prompt)["input_ids"]
        tokens = stock_tokens(start / "run" / "written" / budget, row["prompt_tokens"], NEW_TOKENS)
        assert row["tokens"] == other["tokens"] == tokens
        assert row["text"] == other["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        shown = row["text"][:10].translate(CONTROL_CODES)
        assert prompt in nested.screen and shown and shown in nested.screen
        assert row["parts"][0]["name"] == budget and other["parts"][0]["name"] == "whole model"


def test_a_text_ends_where_stock_transformers_ends_it(start: Path, done: dict[str, Any]) -> None:
    for row, other in zip(done["ends"].rows, done["full"].rows, strict=True):
        assert row["tokens"] == stock_tokens(start / "run" / "ends", row["prompt_tokens"], NEW_TOKENS)
        assert other["tokens"][: len(row["tokens"])] == row["tokens"]
    assert len(done["ends"].rows[0]["tokens"]) <= 6 and done["ends"].rows[0]["end"] == "end of text"


def test_a_forced_switch_equals_two_stock_models_by_hand(start: Path, done: dict[str, Any]) -> None:
    folder = start / "run" / "written"
    marker = AutoTokenizer.from_pretrained(folder / "full")("</think>")["input_ids"]
    for row in done["forced"].rows:
        thought = stock_tokens(folder / "half", row["prompt_tokens"], THINK_TOKENS)
        prefix = [*row["prompt_tokens"], *thought, *marker]
        answer = stock_tokens(folder / "full", prefix, NEW_TOKENS)
        assert row["tokens"] == [*thought, *marker, *answer]
        assert row["forced_marker"] and row["switch"] == THINK_TOKENS + len(marker)
        assert [part["name"] for part in row["parts"]] == ["half", "full"]
        assert row["parts"][1]["read_tokens"] == len(prefix)
        assert row["text"].endswith("</think>" + row["answer"])


def test_a_marker_that_comes_by_itself_switches(start: Path, done: dict[str, Any]) -> None:
    (row,), marker = done["natural"].rows, done["marker"]
    thinking = row["text"].removesuffix(row["answer"])
    assert not row["forced_marker"] and marker in thinking
    assert row["tokens"][: row["switch"]] == done["half"].rows[0]["tokens"][: row["switch"]]
    prefix = row["prompt_tokens"] + row["tokens"][: row["switch"]]
    answer = stock_tokens(start / "run" / "written" / "full", prefix, NEW_TOKENS)
    assert row["tokens"][row["switch"] :] == answer


def _drawn_on_two_ranks(start: Path) -> Written:
    return write(start, "drawn_on_two", 2, parallel=dict(tensor=2), **DRAWN)


def test_two_ranks_write_the_same_and_only_one_speaks(start: Path, done: dict[str, Any]) -> None:
    first, second = run_distributed(_drawn_on_two_ranks, 2, start)
    alone = done["drawn"]
    assert first.tokens == alone.tokens
    assert alone.tokens[0] != alone.tokens[1], "the same prompt twice is answered twice"
    assert first.screen.splitlines()[1] == alone.screen.splitlines()[1] and second.screen == ""


def test_a_subnet_by_hand_a_prompt_from_a_file_and_the_whole_model(done: dict[str, Any]) -> None:
    (row,) = done["thin"].rows
    assert row["prompt"] == PROMPTS[0] and row["parts"][0]["subnet"]["kept_layers"] == [0, 1, 2]
    several = [done[name].rows[0]["tokens"] for name in ("whole", "full", "half", "thin", "drawn")]
    assert len({tuple(tokens) for tokens in several}) == 5, "the router's budgets are none the whole model here"


def test_text_is_printed_again_by_the_same_command_and_leaves_nothing(done: dict[str, Any]) -> None:
    first, second = done["printed twice"]
    assert first == second and "prompt 1 of 1" in first


def test_line_breaks_of_a_shell_are_line_breaks(done: dict[str, Any]) -> None:
    for row in done["escaped"].rows:
        assert row["prompt"] == "the\nsmall\\n"
