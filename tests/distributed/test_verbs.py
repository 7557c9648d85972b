"""The verbs behind the main job, end to end on a tiny family: extract, import, evaluate, and their refusals."""

import json
from unittest import mock

import pytest
from rich.console import Console

from elastic.checkpoint.contents import CheckpointError
from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.config.load import load
from elastic.config.serving import EvaluateConfig, ExtractConfig, ImportConfig
from elastic.config.training import ImportanceConfig
from elastic.data.prepare import PrepareConfig, prepare
from elastic.run.folder import RunFolderError
from elastic.space.axes import Axis
from elastic.verbs.estimate_importance import PermutationError, run_importance
from elastic.verbs.evaluate import run_evaluate
from elastic.verbs.extract import run_extract
from elastic.verbs.family import FamilyError
from elastic.verbs.import_hf import run_import
from tests.distributed.harness import run_distributed
from tests.distributed.training import elastic_values, place, train


@pytest.fixture(scope="module")
def family(start):
    run_distributed(train, 1, elastic_values(start, "family"))
    return start / "run" / "family"


def evaluate(start, version, checkpoint, processes=1, data="data", **more):
    values = dict(
        init_from=dict(checkpoint=str(checkpoint), **more.pop("init_from", {})),
        data=dict(path=str(start / data), micro_batch=2, validation_sequences=7),
        sequence_length=32,
        exp_manager=place(start, version),
        **more,
    )
    run_distributed(_evaluate, processes, values)
    return {
        row["name"]: row for row in json.loads((start / "run" / version / "evaluation.json").read_text())["members"]
    }


def _evaluate(values):
    run_evaluate(load(EvaluateConfig, values), Console(quiet=True))


def _extract(values):
    run_extract(load(ExtractConfig, values), Console(quiet=True))


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
        prepare(PrepareConfig(str(start / output), paths, "lines", tokenizer_path=str(start / "data")))
        rows.append(evaluate(start, f"on_{output}", family, processes, data=output))
    assert rows[0] == rows[1]
    for one, two in zip(rows[0].values(), rows[2].values(), strict=True):
        assert set(one["loss_by_source"]) == {str(start / "prose"), str(start / "code")}
        assert two["loss_by_source"] == pytest.approx(one["loss_by_source"], abs=1e-5)
        low, high = sorted(one["loss_by_source"].values())
        assert low < one["loss"] < high


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
        cut = evaluate(start, f"cut_{name}", row["megatron"])["parent"]
        assert cut["params"] == in_place[name]["params"] == row["params"]
        run_distributed(_import, 1, dict(source=row["hugging_face"], exp_manager=place(start, f"imported_{name}")))
        imported = evaluate(start, f"back_{name}", start / "run" / f"imported_{name}")["parent"]
        # Padding of narrower FFN layers comes back as zeros: more parameters, the same function.
        assert imported["params"] == row["stored_params"]
        assert cut["loss"] == pytest.approx(in_place[name]["loss"], abs=1e-5)
        assert imported["loss"] == pytest.approx(in_place[name]["loss"], abs=1e-5)


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
    with pytest.raises(Exception, match=r"budget_names = \['third'\]") as refused:
        evaluate(start, "unknown_budget", family, budget_names=["third"])
    assert isinstance(refused.value.__cause__, FamilyError)
    with pytest.raises(Exception, match=r"subnets = \['half'\]: a budget has that name already") as refused:
        evaluate(start, "twice", family, subnets=[dict(name="half", hidden=32)])
    assert isinstance(refused.value.__cause__, FamilyError)
    with pytest.raises(Exception, match="neither a checkpoint nor a run folder") as refused:
        evaluate(start, "no_checkpoint", start / "nowhere")
    assert isinstance(refused.value.__cause__, CheckpointError)


def _permute_wrongly(values):
    """Run the importance verb with a permutation that reorders FFN rows but not the columns that read them."""

    def wrong(tensor, name, *_):
        return tensor.flip(0) if name.endswith("linear_fc1.weight") else tensor

    with mock.patch("elastic.verbs.estimate_importance.permute_parameter", wrong):
        run_importance(load(ImportanceConfig, values), Console(quiet=True))


def test_a_permutation_that_moves_the_logits_writes_no_checkpoint(start):
    values = dict(
        init_from=dict(parent=str(start / "run" / "parent")),
        data=dict(path=str(start / "data")),
        importance=dict(num_sequences=4, sequence_length=32, micro_batch=4, depth="none"),
        exp_manager=place(start, "wrong"),
    )
    with pytest.raises(Exception, match="logits of the permuted parent moved") as refused:
        run_distributed(_permute_wrongly, 1, values)
    assert isinstance(refused.value.__cause__, PermutationError)
    assert not (start / "run" / "wrong" / "checkpoints").exists()
    assert not (start / "run" / "wrong" / "ranking.safetensors").exists()
