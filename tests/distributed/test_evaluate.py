"""What evaluation says beside the held-out loss: of the test split, by position; and choices that no router learnt."""

import pytest

from elastic.config.inputs import SubnetConfig
from elastic.config.load import load
from elastic.corpus.prepare import PrepareConfig, prepare
from elastic.space.cost import subnet_cost
from tests.distributed.harness import run_distributed
from tests.distributed.training import elastic_values, evaluate, tiny_run_space, train

SHAPE = tiny_run_space().parent
BY_HAND = dict(hidden=48, ffn=[96], mamba_heads=[4], attention_heads=[4])
MEMBERS = [dict(name="whole"), dict(name="half", **BY_HAND)]


def test_the_loss_by_parts_of_the_sequence_makes_up_the_loss_at_any_layout(start):
    checkpoint = start / "run" / "permuted"
    plain = evaluate(start, "plain", checkpoint, subnets=MEMBERS)
    parts = [evaluate(start, f"parts_{name}", checkpoint, processes=2, subnets=MEMBERS, position_buckets=3,
                      parallel={name: 2}) for name in ("tensor", "context")]  # fmt: skip
    assert parts[0].keys() == plain.keys()
    for name, row in parts[0].items():
        assert "loss_by_position" not in plain[name]
        assert row["loss"] == pytest.approx(plain[name]["loss"], abs=1e-5)
        assert row["loss_by_position"] == pytest.approx(parts[1][name]["loss_by_position"], abs=1e-5)
        weighed = zip((11, 11, 10), row["loss_by_position"], strict=True)  # places 0 to 10, 11 to 21, 22 to 31
        assert sum(count * loss for count, loss in weighed) / 32 == pytest.approx(row["loss"], abs=1e-5)


def test_the_test_split_is_read_where_it_is_asked_for(start):
    lines = [f"melon {number * number} {'melon ' * (number % 4)}" for number in range(400)]
    (start / "melons.txt").write_text("\n".join(lines))
    text = dict(output_dir=str(start / "melons"), tokenizer_path=str(start / "data"), test_ratio=0.1)
    prepare(PrepareConfig([str(start / "melons.txt")], "lines", **text))
    validated, tested = (
        evaluate(start, f"melons_{split}", start / "run" / "permuted", data="melons", split=split)["parent"]
        for split in ("validation", "test")
    )
    assert tested["num_tokens"] == validated["num_tokens"] and tested["loss"] != validated["loss"]


@pytest.mark.parametrize("seed", [None, 1, 2], ids=lambda seed: "by hand" if seed is None else f"by chance {seed}")
def test_a_family_of_choices_that_no_router_learnt(start, seed):
    """By hand each budget is given its subnet; else a router that never trains chooses what its first weights say."""
    cost = subnet_cost(SHAPE, load(SubnetConfig, dict(name="half", **BY_HAND)).subnet(SHAPE))
    phase = dict(name="short", sequence_length=32, global_batch=8, steps=1, router_frozen=True, execution="slice")
    values = elastic_values(start, f"unlearnt_{seed}", curriculum=[phase], seed=seed or 0)
    values["elastic"]["budgets"] = [dict(name="full", ratio=1.0), dict(name="half", target=float(cost.params))]
    if seed is None:
        values["init_from"]["subnets"] = [dict(name="full"), dict(name="half", **BY_HAND)]
    run_distributed(train, 1, values)
    rows = evaluate(start, f"unlearnt_{seed}_rows", start / "run" / f"unlearnt_{seed}")
    assert rows["half"]["cost_ratio"] == pytest.approx(1.0, abs=0.01 if seed else 1e-9)
    assert rows["full"]["cost_ratio"] == pytest.approx(1.0, abs=0.02 if seed else 0)
    assert (rows["half"]["subnet"]["hidden"] == 48 and set(rows["half"]["subnet"]["ffn"]) == {96}) or seed
