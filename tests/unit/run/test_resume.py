"""A checkpoint is gone on with by its own run: what may differ, what needs the user's word, what cannot change."""

import copy
import json
import re
from dataclasses import replace

import pytest

from elastic.checkpoint.record import Family, Record
from elastic.checkpoint.state import TrainingState
from elastic.config.load import config_dict, flatten, load
from elastic.config.verbs import ElasticConfig, PretrainConfig
from elastic.run.changes import PACKING, RULES, ResumeError, differences, rule_of
from elastic.run.resume import check_accepted, weights_sha256
from tests.distributed.training import elastic_values

INPUTS = {"data.path (train split)": "a" * 64, "init_from.permuted_parent": "b" * 64}


def values(tmp_path, **overrides):
    found = copy.deepcopy(elastic_values(tmp_path, "run"))
    found["model"]["vocab"] = 320
    found["data"]["micro_batch"] = 1
    for path, value in overrides.items():
        *sections, last = path.split("__")
        place = found
        for section in sections:
            place = place[int(section) if section.isdigit() else section]
        place[last] = value
    return found


def record_of(config, ranking=(0, 1, 2, 3, 4)):
    space, width = config.space(ranking), config.elastic.router.hidden_width
    family = Family(space.axes, config.budgets(), config.elastic.deployment, width, space.keep_at_least)
    return Record("elastic", space.parent, space.lanes, space.depth_ranking, "data", family)


def compare(then, now, step=3, replicas=(1, 1), inputs=(INPUTS, INPUTS), rankings=((0, 1, 2, 3, 4),) * 2, packing=None):
    """Return the differences by field; the curriculum is 5 steps and 4 steps long."""
    old, new = load(ElasticConfig, then), load(ElasticConfig, now)
    state = TrainingState(step, 1234, config_dict(old), {"inputs": inputs[0], "replicas": replicas[0]})
    origin = {"inputs": inputs[1], "replicas": replicas[1]}
    then_record, now_record = record_of(old, rankings[0]), record_of(new, rankings[1])
    if packing is not None:
        then_record, now_record = (
            replace(record, provenance={} if words is None else {PACKING: words})
            for record, words in zip((then_record, now_record), packing, strict=True)
        )
    found = differences(state, then_record, new, now_record, origin)
    return {difference.field: difference for difference in found}


def changed(tmp_path, step=3, **overrides):
    return compare(values(tmp_path), values(tmp_path, **overrides), step)


def verdicts(found):
    return {field: difference.acceptable for field, difference in found.items()}


def test_every_field_of_both_training_configs_has_a_rule_and_every_rule_a_field(tmp_path):
    paths = flatten(config_dict(load(ElasticConfig, values(tmp_path)))).keys()
    paths |= flatten(config_dict(load(PretrainConfig, dict(data=dict(path="x"))))).keys()
    used = {next(pattern for pattern, *_ in RULES if re.fullmatch(pattern.replace("*", ".*"), p)) for p in paths}
    assert used == {pattern for pattern, *_ in RULES}
    with pytest.raises(KeyError, match=r"no rule of changes\.py"):
        rule_of("new_section.field")


def test_the_same_command_goes_on(tmp_path):
    for step in (1, 5, 9):
        assert changed(tmp_path, step) == {}


@pytest.mark.parametrize(
    "overrides",
    [
        dict(parallel=dict(tensor=2), curriculum__1__parallel=dict(context=2)),
        dict(exp_manager__keep_last_checkpoints=5, trainer__max_steps=4, trainer__checkpoint_every_n_steps=1),
        dict(data__path="elsewhere", init_from__permuted_parent="elsewhere"),
        dict(model__pattern="M-|M*-", parallel=dict(pipeline=2)),
        dict(curriculum__0__steps=None, curriculum__0__tokens=5 * 8 * 32),
        dict(curriculum__0__budget_weights=dict(full=2.0, half=2.0)),
        dict(elastic__budgets__0__ratio=None, elastic__budgets__0__target=131056),
    ],
    ids=["layout", "rhythm", "paths", "pipeline cut", "tokens for steps", "uniform spelt out", "ratio as target"],
)
def test_what_means_the_same_is_no_difference(tmp_path, overrides):
    if "elastic__budgets__0__ratio" in overrides:
        full = load(ElasticConfig, values(tmp_path)).budgets()[0].target
        overrides = {**overrides, "elastic__budgets__0__target": full}
    assert changed(tmp_path, **overrides) == {}


def test_another_model_space_seed_or_precision_is_refused_whatever_is_accepted(tmp_path):
    found = changed(
        tmp_path, model__ffn=256, elastic__space__ffn=dict(choices=[256, 128]), elastic__router__hidden_width=8,
        seed=5, trainer__precision="bf16",
    )  # fmt: skip
    del found["elastic.budgets"]  # ratios of another parent
    assert verdicts(found) == dict.fromkeys(
        ["model.ffn", "elastic.space.ffn.choices", "elastic.space.ffn.per_layer", "elastic.router.hidden_width",
         "seed", "trainer.precision"], False,
    )  # fmt: skip
    with pytest.raises(ResumeError) as refused:
        check_accepted(tmp_path, 3, list(found.values()), list(found))
    for line in ("6 differences", "model.ffn = 256, the checkpoint has 128: ", "seed = 5, the checkpoint has 1234: "):
        assert line in str(refused.value)
    assert "accept_changes" not in str(refused.value)


def test_the_optimizer_and_the_loss_change_on_the_users_word_only(tmp_path):
    found = changed(tmp_path, optim=dict(adam_beta2=0.95), distill=dict(temperature=2.0), elastic__router__mode=
                    "straight_through")  # fmt: skip
    assert verdicts(found) == dict.fromkeys(["optim.adam_beta2", "distill.temperature", "elastic.router.mode"], True)
    with pytest.raises(ResumeError, match=re.escape("'exp_manager.accept_changes=[distill.temperature,")):
        check_accepted(tmp_path, 3, list(found.values()), ["optim.adam_beta2"])
    check_accepted(tmp_path, 3, list(found.values()), [*found, "curriculum.7"])


def test_phases_are_fixed_once_trained_and_open_until_then(tmp_path):
    rates = dict(curriculum__0__lr=dict(peak=1.0), curriculum__1__lr=dict(peak=1.0))
    assert verdicts(changed(tmp_path, 3, **rates)) == {"curriculum.0.lr.peak": True, "curriculum.1.lr.peak": True}
    assert verdicts(changed(tmp_path, 5, **rates)) == {"curriculum.0.lr.peak": True, "curriculum.1.lr.peak": True}
    assert verdicts(changed(tmp_path, 6, **rates)) == {"curriculum.0.lr.peak": False, "curriculum.1.lr.peak": True}


@pytest.mark.parametrize(
    ("step", "steps", "acceptable"), [(3, 2, False), (3, 3, True), (3, 50, True), (5, 6, True), (6, 6, False)]
)
def test_the_running_phase_may_be_longer_or_end_where_it_stands(tmp_path, step, steps, acceptable):
    assert verdicts(changed(tmp_path, step, curriculum__0__steps=steps)) == {"curriculum.0.steps": acceptable}


def test_samples_of_a_phase_in_progress_are_neither_skipped_nor_doubled(tmp_path):
    batch = dict(curriculum__0__global_batch=16, curriculum__1__sequence_length=32)
    running = changed(tmp_path, 3, **batch)
    assert verdicts(running) == {"curriculum.0.global_batch": False, "curriculum.1.sequence_length": True}
    assert "end the phase here with curriculum.0.steps=3 and add a phase" in str(running["curriculum.0.global_batch"])


def test_phases_may_be_added_and_those_to_come_left_out(tmp_path):
    then, longer = values(tmp_path), values(tmp_path)
    longer["curriculum"].append(dict(longer["curriculum"][1], name="more"))
    assert verdicts(compare(then, longer, 9)) == {"curriculum.2": True}
    assert verdicts(compare(longer, then, 9)) == {"curriculum.2": True}
    assert verdicts(compare(longer, then, 10)) == {"curriculum.2": False}


def test_budgets_are_compared_as_what_they_ask_for_while_the_router_can_still_learn_them(tmp_path):
    then, now = values(tmp_path), values(tmp_path)
    now["elastic"]["budgets"] = [*now["elastic"]["budgets"], dict(name="third", ratio=0.8)]
    assert verdicts(compare(then, now, 3)) == {"elastic.budgets": True}
    assert verdicts(compare(then, now, 5)) == {"elastic.budgets": False}, "the router is frozen in the second phase"
    # One that is left out is not learnt, and may leave then, too.
    assert verdicts(compare(now, then, 5)) == {"elastic.budgets": True}
    wider = values(tmp_path)
    wider["elastic"]["budgets"] = [dict(one, tolerance=0.02) for one in wider["elastic"]["budgets"]]
    found = compare(then, wider, 3)
    assert verdicts(found) == {"elastic.budgets": True}
    assert "within 1%" in str(found["elastic.budgets"]) and "within 2%" in str(found["elastic.budgets"])
    # The one that differs is named, whole; a target in whole parameters is the ratio's.
    last = load(ElasticConfig, then).budgets()[-1]
    others, one = then["elastic"]["budgets"][:-1], dict(name=last.name, target=round(last.limit))
    now["elastic"]["budgets"] = [*others, one]
    assert compare(then, now, 3) == {}
    now["elastic"]["budgets"] = [*others, one | dict(target=round(last.limit) + 7)]
    said = str(compare(then, now, 3)["elastic.budgets"])
    assert said.startswith(
        f'elastic.budgets = "{last.name} params {round(last.limit) + 7} within 1%", the checkpoint has'
    )
    now["elastic"]["budgets"] = then["elastic"]["budgets"][::-1]
    assert "drawn in this order" in str(compare(then, now, 5)["elastic.budgets"])


def test_other_content_under_the_same_path_is_noticed(tmp_path):
    same = values(tmp_path)
    other = {**INPUTS, "data.path (train split)": "c" * 64}
    assert verdicts(compare(same, same, inputs=(INPUTS, other))) == {"data.path (train split)": False}
    # A family is where a run begins: one that comes later would say nothing.
    family = INPUTS | {"init_from.family": "d" * 64}
    assert compare(same, same, inputs=(family, family)) == {}
    found = compare(same, same, inputs=(INPUTS, family))
    assert verdicts(found) == {"init_from.family": False} and 'the checkpoint has "absent"' in str(
        found["init_from.family"]
    )
    ranked = compare(same, same, rankings=((0, 1, 2, 3, 4), (4, 3, 2, 1, 0)))
    assert verdicts(ranked) == {"init_from.permuted_parent (depth ranking)": False}


@pytest.mark.parametrize(
    ("then", "now", "differs"),
    [
        (None, "concatenated", False),  # of a version that knew nothing else
        ("isolated, longer documents cut", "isolated, longer documents cut", False),
        (None, "isolated, longer documents cut", True),
        ("isolated, longer documents cut", "isolated, longer documents left out", True),
    ],
)
def test_sequences_made_otherwise_want_the_users_word(tmp_path, then, now, differs):
    same = values(tmp_path)
    assert verdicts(compare(same, same, packing=(then, now))) == ({"data.packing": True} if differs else {})


def test_draws_that_follow_the_layout_are_a_difference_unless_both_numbers_are_set(tmp_path):
    fixed = dict(elastic__router__draws_per_step=4, elastic__router__noise_draws_per_step=4)
    then, now = values(tmp_path, **fixed), values(tmp_path, data__micro_batch=2, **fixed)
    assert compare(then, now, replicas=(1, 2)) == {}
    null = dict(elastic__router__draws_per_step=None)
    then, now = values(tmp_path, **null), values(tmp_path, **null)
    assert verdicts(compare(then, now, replicas=(1, 2))) == {"elastic.router.draws_per_step": True}
    found = compare(then, values(tmp_path, data__micro_batch=2, **null))
    assert verdicts(found) == {"elastic.router.draws_per_step": True, "elastic.router.noise_draws_per_step": True}
    assert "null (8, 8 in a step)" in str(found["elastic.router.draws_per_step"])
    halved = compare(then, values(tmp_path, **null, curriculum__1__parallel=dict(tensor=2)), replicas=(2, 2))
    assert "null (4, 8 in a step)" in str(halved["elastic.router.draws_per_step"])
    # In the second phase the router is frozen: no noise is left to fall otherwise.
    assert verdicts(compare(values(tmp_path), values(tmp_path, data__micro_batch=2), step=5)) == {}


def test_another_verbs_checkpoint_is_one_difference(tmp_path):
    config = load(ElasticConfig, values(tmp_path))
    parent = Record("parent", config.model.shape())
    found = list(differences(TrainingState(3, 1234, {}, {}), parent, config, record_of(config), {}))
    assert [difference.field for difference in found] == ["verb"] and not found[0].acceptable


def test_a_config_of_another_version_names_what_is_unknown(tmp_path):
    config = load(ElasticConfig, values(tmp_path))
    stored = config_dict(config)
    stored["trainer"]["warp"] = 9
    state = TrainingState(3, 1234, stored, {"inputs": INPUTS, "replicas": 1})
    found = list(differences(state, record_of(config), config, record_of(config), {"inputs": INPUTS, "replicas": 1}))
    assert [(difference.field, difference.acceptable) for difference in found] == [("trainer.warp", False)]


@pytest.mark.parametrize(("ranking", "goes_on"), [((0, 1, 3, 2, 4), True), ((0, 1, 2, 4, 3), False)])
def test_a_run_from_before_the_rule_of_kept_layers_goes_on_where_the_rule_changes_nothing(tmp_path, ranking, goes_on):
    """The pattern is M-M*-, the smallest depth 3; a record of that time says no rule, and its config neither."""
    config = load(ElasticConfig, values(tmp_path))
    now = record_of(config, ranking)
    (tmp_path / "checkpoint").mkdir()
    now.write(tmp_path / "checkpoint")
    content = json.loads((tmp_path / "checkpoint" / "record.json").read_text())
    assert content["family"].pop("keep_at_least") == {"attention": 1}
    (tmp_path / "checkpoint" / "record.json").write_text(json.dumps(content))
    saved = Record.read(tmp_path / "checkpoint")
    assert saved.family.keep_at_least == {} and saved.space().kept_layers(3) == tuple(sorted(ranking[:3]))
    stored = config_dict(config)
    del stored["elastic"]["space"]["keep_at_least"]
    state = TrainingState(3, 1234, stored, {"inputs": INPUTS, "replicas": 1})
    found = list(differences(state, saved, config, now, {"inputs": INPUTS, "replicas": 1}))
    assert verdicts({d.field: d for d in found}) == ({} if goes_on else {"elastic.space.keep_at_least": False})
    unruled = load(ElasticConfig, values(tmp_path, elastic__space__keep_at_least=None))
    assert not list(differences(state, saved, unruled, record_of(unruled, ranking), state.origin))


def test_weights_are_told_apart_by_content(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"a" * 300_000)
    first = weights_sha256(tmp_path)
    assert weights_sha256(tmp_path) == first
    (tmp_path / "__0_0.distcp").write_bytes(b"a" * 150_000 + b"b" + b"a" * 149_999)
    assert weights_sha256(tmp_path) != first


def test_a_subnet_that_a_budget_starts_with_is_never_ignored(tmp_path):
    thin, thinner = dict(name="half", hidden=48), dict(name="half", hidden=32)
    before = values(tmp_path, init_from__subnets=[thin])
    assert compare(before, before) == {} == compare(before, values(tmp_path))  # it has started
    for then, there in ((values(tmp_path), '"absent"'), (before, '"hidden": 48')):
        found = compare(then, values(tmp_path, init_from__subnets=[thinner]))
        assert verdicts(found) == {"init_from.subnets.0": False}
        assert there in (said := str(found["init_from.subnets.0"])) and "leave it out, or start a run" in said
