"""An own parent needs no file: its checkpoint says the model, and shares of its widths become choices."""

import random
from pathlib import Path
from typing import Any

import pytest

from elastic.checkpoint.contents import write_contents
from elastic.checkpoint.record import Record
from elastic.config.load import ConfigError
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ModelConfig, ParallelConfig
from elastic.config.verbs import ElasticConfig
from elastic.hf.config import export_warnings
from elastic.space.axes import Axis
from elastic.space.cost import subnet_cost
from elastic.space.reach import smallest_subnet
from elastic.space.shape import Subnet
from elastic.space.space import AxisChoices, Space
from elastic.verbs.inputs import load_run
from elastic.verbs.parent import choices_by_share
from tests.unit.config.configs import put, written_manifest
from tests.unit.config.test_conf_files import composed

SHARES = {axis.value: [1.0, 0.8, 0.6, 0.5, 0.3] for axis in Axis}
OWN = ModelConfig(pattern="M-M*-M-", vocab=333, hidden=96, ffn=320, mamba_heads=12, mamba_groups=4, kv_heads=4)


def random_model(draw: random.Random) -> ModelConfig:
    groups, kv_heads = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 4])
    return ModelConfig(
        pattern="".join(draw.choices("M-*", k=draw.randint(1, 9))),
        vocab=draw.randint(50, 500),
        hidden=draw.randint(5, 700),
        ffn=8 * draw.randint(1, 90),
        mamba_heads=groups * draw.randint(1, 12),
        head_channels=draw.randint(1, 80),
        mamba_groups=groups,
        attention_heads=kv_heads * draw.randint(1, 9),
        kv_heads=kv_heads,
    )


@pytest.mark.parametrize("seed", range(40))
def test_shares_of_any_parent_become_a_legal_space(seed: int) -> None:
    shape = random_model(random.Random(seed)).shape()
    space = Space(shape, {}, lanes=8)
    axes, heads = {}, shape.mamba_heads[:1]
    for axis in Axis:
        if space.full_width(axis) and (heads or axis is not Axis.MAMBA_CHANNEL):
            axes[axis] = AxisChoices(tuple(choices_by_share(axis, SHARES[axis], space, ParallelConfig(), heads)))
            full, multiple = space.full_width(axis), space.parts(axis)
            assert all(width % multiple == 0 for width in axes[axis].choices)
            for share in SHARES[axis]:
                nearest = min(abs(width - share * full) for width in axes[axis].choices)
                assert nearest <= max(full / 16, multiple / 2, multiple - share * full)
    built = Space(shape, axes, lanes=8)  # raises for choices that the layout does not allow
    assert built.subnet({axis: (-1,) * built.num_slots(axis) for axis in Axis}).shape(shape)


def test_choices_keep_the_rules_of_kernels_and_of_parallel_ranks() -> None:
    parallel = ParallelConfig(tensor=2, context=4)
    space = Space(ModelConfig(vocab=512, hidden=1024, ffn=4096, mamba_heads=48, head_channels=64).shape(), {})
    heads = choices_by_share(Axis.MAMBA_HEAD, [1.0, 0.7, 0.5], space, parallel)
    assert heads[0] == 48 and len(heads) == 3 and all(width % 8 == 0 for width in heads)
    for axis, widths in {
        axis: choices_by_share(axis, SHARES[axis], space, parallel, heads) for axis in (Axis.HIDDEN, Axis.MAMBA_CHANNEL)
    }.items():
        assert len(widths) == 5
        for width in widths:
            cut = Space(space.parent, {axis: AxisChoices(tuple(dict.fromkeys((widths[0], width))))})
            assert not any(
                "convolution" in text for text in export_warnings(cut.subnet({axis: (-1,)}).shape(cut.parent), 2)
            )
    assert all(width % 64 == 0 for width in choices_by_share(Axis.HIDDEN, SHARES["hidden"], space, parallel))


def own_values(folder: Path, record: Record | None = None, **changes: object) -> dict[str, Any]:
    """Return the values of conf/train_elastic.yaml over a permuted parent of an own shape."""
    (folder / "parent").mkdir()
    (record or Record("permuted_parent", OWN.shape(), lanes=16)).write(folder / "parent")
    write_contents(folder / "parent", {})
    values = composed("train_elastic", "parallel=none")
    values["init_from"]["permuted_parent"], values["data"]["path"] = (
        str(folder / "parent"),
        written_manifest(folder / "data"),
    )
    put(values, "exp_manager.exp_dir", str(folder))
    for path, value in changes.items():
        put(values, path.replace("__", "."), value)
    return values


def test_the_checkpoint_says_model_lanes_and_choices(tmp_path: Path) -> None:
    values = own_values(tmp_path, model__init_std=0.5, elastic__space__depth__choices=[7, 5])
    assert "shares" in values["elastic"]["space"]["depth"], "an override leaves them beside the choices"
    config = load_run(ElasticConfig, values, Cluster(), is_main=True)
    assert config.model.shape() == OWN.shape() and config.model.init_std == 0.5
    space = config.space()
    assert space.lanes == 16 and space.axes[Axis.HIDDEN].choices == (96, 80, 72, 64, 48)
    assert space.axes[Axis.DEPTH].choices == (7, 5), "choices that somebody gave stay"
    assert space.axes[Axis.FFN].per_layer and all(width % 16 == 0 for width in space.axes[Axis.FFN].choices)
    assert [budget.name for budget in config.budgets()] == ["full", "medium", "small"]


def test_what_budgets_can_reach_follows_from_the_layers_that_rank_best(tmp_path: Path) -> None:
    shape, ranking, depth = OWN.shape(), (1, 4, 6, 3, 0, 2, 5), AxisChoices((7, 5))  # Mamba layers leave first
    spaces = [Space(shape, {Axis.DEPTH: depth}, 16, order, {"attention": 1}) for order in ((), ranking)]
    unranked, least = (int(subnet_cost(shape, smallest_subnet(space)).params) for space in spaces)
    assert least < 0.99 * unranked
    names = [budget["name"] for budget in composed("train_elastic")["elastic"]["budgets"]]
    given = {"lanes": 16, "depth": {"choices": [7, 5]}, "keep_at_least": {"attention": 1}}
    budgets = [{"name": name, "metric": "params", "target": least, "ratio": None} for name in names]
    changes = {"elastic__space": given, "elastic__budgets": budgets}
    for name in ("ranked", "unranked"):
        (tmp_path / name).mkdir()
    values = own_values(tmp_path / "ranked", Record("permuted_parent", shape, 16, ranking), **changes)
    assert load_run(ElasticConfig, values, Cluster(), is_main=True).budgets()[0].limit == least
    values = own_values(tmp_path / "unranked", Record("permuted_parent", shape, 16), **changes)
    with pytest.raises(ConfigError, match=f"what the choices can reach, {unranked:,} to"):
        load_run(ElasticConfig, values, Cluster(), is_main=True)


SUBMODEL = Subnet(96, (320, 320, 160), (12, 12, 12, 12)[:3], 16, (4,), tuple(range(7)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model__hidden": 128},
            "model.hidden = 128: the checkpoint holds hidden = 96; nearest legal value is 96;",
        ),
        ({"model__pattern": "M-M|*-M*"}, 'model.pattern = "M-M|*-M*": the checkpoint holds pattern = M-M*-M-; nearest'),
        (
            {"elastic__space__hidden": {"shares": [1.0, 2]}},
            "elastic.space.hidden.shares = [1.0, 2]: must be numbers above",
        ),
        ({"elastic__space__lanes": 7}, "model.ffn = 320: must be a multiple of elastic.space.lanes = 7"),
        ({"elastic__space__hidden": {"choices": [96, 200]}}, "elastic.space.hidden.choices = [96, 200]: choice"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_named(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(ElasticConfig, own_values(tmp_path, **changes), Cluster(), is_main=True)
    assert str(caught.value.problems[0]).startswith(line) or any(
        str(problem).startswith(line) for problem in caught.value.problems
    ), str(caught.value)
    assert {problem.section for problem in caught.value.problems} <= {"model", "elastic"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "parent"], "a refused start leaves nothing"


def test_bars_for_pipeline_stages_are_no_other_pattern(tmp_path: Path) -> None:
    config = load_run(ElasticConfig, own_values(tmp_path, model__pattern="M-M*|-M-"), Cluster(), is_main=True)
    assert config.model.pattern == "M-M*|-M-"


def test_a_parent_whose_layers_differ_is_named(tmp_path: Path) -> None:
    shape = SUBMODEL.shape(OWN.shape())
    with pytest.raises(ConfigError, match=r"permuted_parent = .*MLP layers differ in ffn, \[160, 320\]"):
        load_run(ElasticConfig, own_values(tmp_path, Record("permuted_parent", shape, 16)), Cluster(), is_main=True)


def test_a_parent_that_cannot_be_opened_is_the_only_problem(tmp_path: Path) -> None:
    values = own_values(tmp_path)
    (tmp_path / "parent" / "record.json").write_text("{")
    with pytest.raises(ConfigError) as caught:
        load_run(ElasticConfig, values, Cluster(), is_main=True)
    assert [problem.field for problem in caught.value.problems] == ["init_from.permuted_parent"]
