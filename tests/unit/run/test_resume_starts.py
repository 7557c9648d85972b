"""What budgets start with, where a run goes on: compared, and never ignored."""

from tests.unit.run.test_resume import compare, values, verdicts


def test_a_subnet_that_a_budget_starts_with_is_never_ignored(tmp_path):
    thin, thinner = dict(name="half", hidden=48), dict(name="half", hidden=32)
    before = values(tmp_path, init_from__subnets=[thin])
    assert compare(before, before) == {} == compare(before, values(tmp_path))  # it has started
    for then, there in ((values(tmp_path), '"absent"'), (before, '"hidden": 48')):
        found = compare(then, values(tmp_path, init_from__subnets=[thinner]))
        assert verdicts(found) == {"init_from.subnets.0": False}
        assert there in (said := str(found["init_from.subnets.0"])) and "leave it out, or start a run" in said
