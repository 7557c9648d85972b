"""The verbs behind the main job, end to end on a tiny family: extract, import, evaluate, and their refusals."""

import io
import json
import re
from unittest import mock

import pytest
from rich.console import Console

from elastic.checkpoint.contents import CheckpointError
from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.config.load import ConfigError, load
from elastic.config.rules_layout import Cluster
from elastic.config.verbs import ElasticConfig, EvaluateConfig, ExtractConfig, ImportanceConfig, ImportConfig
from elastic.corpus.prepare import PrepareConfig, prepare
from elastic.hf import gguf_tokenizer
from elastic.hf.config import ExportError
from elastic.model.quantised import QuantisationError
from elastic.run.folder import RunFolderError
from elastic.space.axes import Axis
from elastic.verbs.extract import run_extract
from elastic.verbs.import_hf import run_import
from elastic.verbs.inputs import load_run
from elastic.verbs.members import MembersError
from tests.distributed.harness import run_distributed
from tests.distributed.training import elastic_values, evaluate, place, train


@pytest.fixture(scope="module")
def family(start):
    run_distributed(train, 1, elastic_values(start, "family"))
    return start / "run" / "family"


def _extract(values):
    screen = io.StringIO()
    run_extract(load(ExtractConfig, values), Console(file=screen, width=500))
    return screen.getvalue()


def _import(values):
    run_import(load(ImportConfig, values), Console(quiet=True))


def test_the_held_out_loss_is_the_same_for_any_order_of_sources_and_known_for_each(start, family):
    for name, word in (("prose", "melon"), ("code", "return")):
        (start / name).mkdir()
        lines = [f"{word} {number * number} {word * (number % 4)}" for number in range(400)]
        (start / name / "lines.txt").write_text("\n".join(lines))
    rows = []
    for order, processes in ((("prose", "code"), 1), (("code", "prose"), 1), (("code", "prose"), 2)):
        paths, output = [str(start / name) for name in order], f"{'_'.join(order)}_{processes}"
        prepare(PrepareConfig(paths, "lines", output_dir=str(start / output), tokenizer_path=str(start / "data")))
        rows.append(evaluate(start, f"on_{output}", family, processes, data=output))
    assert rows[0] == rows[1]
    for one, two in zip(rows[0].values(), rows[2].values(), strict=True):
        assert set(one["loss_by_source"]) == {str(start / "prose"), str(start / "code")}
        assert two["loss_by_source"] == pytest.approx(one["loss_by_source"], abs=1e-5)
        low, high = sorted(one["loss_by_source"].values())
        assert low < one["loss"] < high


def longest_said(folder):
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_a_family_leaves_through_hugging_face_and_comes_back(start, family):
    in_place = evaluate(start, "in_place", family)
    assert in_place["half"]["params"] < in_place["full"]["params"]
    values = dict(
        init_from=dict(checkpoint=str(family)), export=dict(megatron=True), exp_manager=place(start, "exports")
    )
    run_distributed(_extract, 1, values)
    exported = json.loads((start / "run" / "exports" / "extraction.json").read_text())["members"]
    assert {row["name"] for row in exported} == {"full", "half"}
    for row in exported:
        name = row["name"]
        assert row["max_abs_logit_diff"] <= 1e-4
        assert (start / "run" / "exports" / name / "tokenizer.json").is_file()
        assert longest_said(start / "run" / "exports" / name) == 64  # of the second phase
        cut = evaluate(start, f"cut_{name}", row["megatron"])["parent"]
        assert cut["params"] == in_place[name]["params"] == row["params"]
        run_distributed(_import, 1, dict(source=row["hugging_face"], exp_manager=place(start, f"imported_{name}")))
        imported = evaluate(start, f"back_{name}", start / "run" / f"imported_{name}")["parent"]
        # Padding of narrower FFN layers comes back as zeros: more parameters, the same function.
        assert imported["params"] == row["stored_params"]
        assert cut["loss"] == pytest.approx(in_place[name]["loss"], abs=1e-5)
        assert imported["loss"] == pytest.approx(in_place[name]["loss"], abs=1e-5)


def test_a_run_ends_with_a_page_of_its_members(start, family):
    text = (family / "report.html").read_text()
    for name, row in evaluate(start, "for_the_page", family).items():
        assert f"<td>{name}</td>" in text and f"<td>{row['params']:,}</td>" in text
    parts = ("held-out loss", "what each budget uses of its target", "the router&#x27;s choice: ", "learning rate")
    for part in parts:
        assert part in text, part


def _extract_without_a_name(values):
    """Extract with a tokenizer that splits texts in a way of which llama.cpp knows nothing."""
    nameless = mock.patch.object(gguf_tokenizer, "split_name", mock.Mock(side_effect=ExportError("no name for it")))
    with nameless, pytest.raises(ExportError, match="no name for it"):
        run_extract(load(ExtractConfig, values), Console(quiet=True))


def test_a_tokenizer_that_gguf_cannot_hold_is_refused_before_anything_is_written(start, family):
    values = dict(
        init_from=dict(checkpoint=str(family)), exp_manager=place(start, "no_gguf"), export=dict(format="gguf")
    )
    run_distributed(_extract_without_a_name, 1, values)
    assert not (start / "run" / "no_gguf").exists()


def test_a_family_leaves_in_fp8_for_little_loss(start, family):
    values = dict(init_from=dict(checkpoint=str(family)), exp_manager=place(start, "fp8"), export=dict(format="fp8"))
    (shown,) = run_distributed(_extract, 1, values)
    for row in json.loads((start / "run" / "fp8" / "extraction.json").read_text())["members"]:
        assert 0 < abs(row["loss_fp8"] - row["loss"]) < 0.02 and f"{row['loss_fp8']:.4f}" in shown
        card = (start / "run" / "fp8" / row["name"] / "README.md").read_text()
        assert f"{row['loss']:.4f} before, {row['loss_fp8']:.4f} in FP8" in card
    before = (manifest := start / "data" / "data.json").read_text()  # prepared anew, with other tokens
    manifest.write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 5000', before))
    (shown,) = run_distributed(_extract, 1, values | dict(exp_manager=place(start, "fp8_anew")))
    manifest.write_text(before)
    assert "what FP8 costs in loss was not measured, no held-out tokens" in shown


def test_evaluation_is_the_same_masked_sliced_and_on_two_replicas(start, family):
    sliced = evaluate(start, "sliced", family)
    masked = evaluate(start, "masked", family, execution="mask")
    on_two = evaluate(start, "on_two", family, processes=2)
    on_stages = evaluate(start, "on_stages", family, processes=2, parallel=dict(pipeline=2))
    for name, row in sliced.items():
        for other in (masked, on_two, on_stages):
            assert other[name]["loss"] == pytest.approx(row["loss"], rel=1e-6)
            assert other[name]["num_tokens"] == row["num_tokens"] == 7 * 32


def test_a_subnet_given_by_hand_and_weights_with_anothers_router(start, family):
    subnets = [dict(name="thin", hidden=32, ffn=[64], kept_layers=[0, 1, 2])]
    rows = evaluate(start, "by_hand", family, budget_names=["half"], subnets=subnets)
    assert rows.keys() == {"half", "thin"} and rows["thin"]["subnet"]["kept_layers"] == [0, 1, 2]
    untrained = evaluate(start, "untrained", start / "run" / "permuted", init_from=dict(router=str(family)))
    assert untrained["half"]["subnet"] == rows["half"]["subnet"]
    assert untrained["half"]["loss"] != rows["half"]["loss"]


def test_the_whole_parent_is_evaluated_as_an_fp8_teacher_and_nothing_else_is(start, family):
    permuted = start / "run" / "permuted"
    exact, rounded = (
        evaluate(start, f"teacher_{precision}", permuted, teacher_precision=precision)["parent"]["loss"]
        for precision in ("bf16", "fp8")
    )
    assert exact != rounded and abs(rounded - exact) < 0.05
    with pytest.raises(Exception, match=r"runs the whole parent alone, as a slice, and \['half'\] are cut") as refused:
        evaluate(start, "half_a_teacher", family, budget_names=["half"], teacher_precision="fp8")
    assert isinstance(refused.value.__cause__, QuantisationError)


def test_the_record_says_what_a_checkpoint_is(start, family):
    parent = Record.read(resolve_checkpoint(start / "run" / "parent"))
    permuted = Record.read(resolve_checkpoint(start / "run" / "permuted"))
    trained = Record.read(resolve_checkpoint(family))
    assert (parent.kind, permuted.kind, trained.kind) == ("parent", "permuted_parent", "elastic")
    assert parent.shape == permuted.shape == trained.shape
    assert sorted(permuted.depth_ranking) == list(range(5)) and trained.depth_ranking == permuted.depth_ranking
    assert trained.space().axes[Axis.HIDDEN].choices == (64, 48, 32)


def test_nothing_is_overwritten_and_wrong_inputs_are_named(start, family):
    with pytest.raises(Exception, match="exists already") as refused:
        evaluate(start, "family", family)
    assert isinstance(refused.value.__cause__, RunFolderError)
    with pytest.raises(Exception, match=r"budget_names = \[\"third\"\]: not in .*, which has full, half") as refused:
        evaluate(start, "unknown_budget", family, budget_names=["third"])
    assert isinstance(refused.value.__cause__, MembersError)
    with pytest.raises(Exception, match=r"subnets\.0\.name = \"half\": a budget has that name already") as refused:
        evaluate(start, "twice", family, subnets=[dict(name="half", hidden=32)])
    assert isinstance(refused.value.__cause__, MembersError)
    assert not (start / "run" / "unknown_budget").exists() and not (start / "run" / "twice").exists()
    with pytest.raises(Exception, match="neither a checkpoint nor a run folder") as refused:
        evaluate(start, "no_checkpoint", start / "nowhere")
    assert isinstance(refused.value.__cause__, CheckpointError)


def checked(start, kind, **values):
    """Return the problems that a verb's config has before anything is done; nothing is written."""
    before = sorted(start.rglob("*"))
    common = dict(exp_manager=place(start, "refused"))
    if kind is not ExtractConfig:
        common["data"] = dict(
            path=str(start / "data"),
            **({} if kind is ImportanceConfig else dict(micro_batch=2, validation_sequences=4)),
        )
    with pytest.raises(ConfigError) as refused:
        load_run(kind, {**common, **values}, Cluster(), is_main=True)
    assert sorted(start.rglob("*")) == before
    return [f"{problem.field}: {problem.rule}; {problem.remedy}" for problem in refused.value.problems]


# What is asked of a family of full and half, hidden 64, 8 lanes and 5 layers M-M*-, and the line that refuses it.
REFUSED = [
    (dict(budget_names=["nope"]), "budget_names: not in .*, which has full, half; nearest: "),
    (
        dict(subnets=[dict(name="x", kept_layers=[0, 9])]),
        r"subnets\.0: subnet: kept_layers = \(0, 9\) must be ascending",
    ),
    (dict(subnets=[dict(name="x", hidden=128)]), r"subnets\.0: subnet: hidden = 128 is not within 1\.\.64"),
    (dict(subnets=[dict(name="x", ffn=[60])]), r"subnets\.0\.ffn: widths must be multiples of the lanes = 8; .*\[64\]"),
    (dict(subnets=[dict(name="x", ffn=[64, 64, 64])]), r"subnets\.0: subnet: ffn has 3 widths, the parent has 2 MLP"),
    (dict(subnets=[dict(name="half")]), r"subnets\.0\.name: a budget has that name already"),
    (
        dict(subnets=[dict(name="x", params=10)]),
        r"subnets\.0\.params: target 10 params lies outside .*; nearest",
    ),
    (dict(subnets=[dict(name="x", params=50_000, hidden=32)]), r"subnets\.0\.params: widths are given beside it"),
]


@pytest.mark.parametrize("kind", [EvaluateConfig, ExtractConfig])
@pytest.mark.parametrize(("asked", "line"), REFUSED)
def test_members_that_are_not_there_are_refused_before_anything_is_written(start, family, kind, asked, line):
    length = dict(sequence_length=32) if kind is EvaluateConfig else {}
    (problem,) = checked(start, kind, init_from=dict(checkpoint=str(family)), **length, **asked)
    assert re.match(line, problem), problem


def test_all_that_is_wrong_with_the_members_comes_together(start, family):
    subnets = [dict(name="half", hidden=128), dict(name="y", ffn=[60])]
    given = dict(
        init_from=dict(checkpoint=str(family)), budget_names=["nope", "half"], subnets=subnets, sequence_length=32
    )
    fields = [line.partition(":")[0] for line in checked(start, EvaluateConfig, **given)]
    assert fields == ["budget_names", "subnets.0", "subnets.0.name", "subnets.1.ffn"]


def test_a_subnet_that_masks_cannot_run_is_refused_before(start, family):
    given = dict(init_from=dict(checkpoint=str(family)), subnets=[dict(name="x", hidden=40)], sequence_length=32)
    (problem,) = checked(start, EvaluateConfig, **given, execution="mask")
    assert problem == "execution: hidden width 40 is not among the choices [64, 48, 32]; use execution=slice"


def test_importance_is_checked_against_its_parent_and_its_text(start):
    given = dict(init_from=dict(parent=str(start / "run" / "parent")))
    small = dict(num_sequences=4, sequence_length=32, micro_batch=4, depth_sequences=4)
    (removed,) = checked(start, ImportanceConfig, **given, importance=dict(small, max_removed_layers=5))
    assert removed.startswith(
        "importance.max_removed_layers: must be below the parent's 5 layers; nearest legal value is 4"
    )
    (length,) = checked(start, ImportanceConfig, **given, importance=dict(small, sequence_length=1_000_000))
    assert re.match(r"importance\.sequence_length: the training split of .* holds [\d,]+ tokens", length)


def test_training_is_checked_against_its_text(start):
    values = elastic_values(start, "refused")
    values["curriculum"] = [dict(values["curriculum"][0], sequence_length=1_000_000)]
    lines = checked(start, ElasticConfig, **values)
    assert any(re.match(r"curriculum\.0\.sequence_length: the training split of", line) for line in lines)


def test_a_subnet_of_so_many_parameters_lies_between_the_budgets(start, family):
    rows = evaluate(start, "of_both", family)
    full, half = (rows[name] for name in ("full", "half"))
    wanted = (full["params"] + half["params"]) // 2
    found = evaluate(start, "solved", family, budget_names=[], subnets=[dict(name="x", params=wanted)])["x"]
    assert full["params"] > found["params"] > half["params"]
    assert abs(found["params"] - wanted) < (full["params"] - half["params"]) / 2, "nearer than either of the two"
    for name in ("hidden", "head_channels"):
        low, high = sorted((full["subnet"][name], half["subnet"][name]))
        assert low <= found["subnet"][name] <= high
    assert set(found["subnet"]["kept_layers"]) <= set(full["subnet"]["kept_layers"])


def test_what_was_never_trained_is_said_in_the_card(start, family):
    thin = dict(name="thin", hidden=32, ffn=[64], kept_layers=[0, 1, 2])
    cards, shown = {}, {}
    for version, run in (
        ("of_family", family),
        ("of_parent", start / "run" / "parent"),
        ("of_permuted", start / "run" / "permuted"),
    ):
        values = dict(init_from=dict(checkpoint=str(run)), subnets=[thin], exp_manager=place(start, version))
        (shown[version],) = run_distributed(_extract, 1, values)
        for folder in (start / "run" / version).iterdir():
            cards[version, folder.name] = (folder / "README.md").read_text() if folder.is_dir() else ""
    assert "no budget of the family was trained at these widths" in cards["of_family", "thin"]
    assert "no order of importance, and never trained at this size" in cards["of_parent", "thin"]
    assert "cut from a permuted parent, and never trained at this size" in cards["of_permuted", "thin"]
    for whole in (("of_family", "half"), ("of_family", "full"), ("of_parent", "parent"), ("of_permuted", "parent")):
        assert "never trained" not in cards[whole] and "given by hand" not in cards[whole]
    assert "note: thin is given by hand: no budget of the family was trained at" in shown["of_family"]
    assert "note: thin is cut from a parent, whose channels are in no order of importance, and" in shown["of_parent"]
    assert "note: thin is cut from a permuted parent, and never trained" in shown["of_permuted"]
    assert all(len(re.findall("note: .* is (?:given|cut)", text)) == 1 for text in shown.values())
    assert (
        longest_said(start / "run" / "of_parent" / "thin") == 32 == longest_said(start / "run" / "of_permuted" / "thin")
    )
