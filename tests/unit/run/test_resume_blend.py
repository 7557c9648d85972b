"""Sources, shares and packing of a blend, where a run goes on."""

import copy

from tests.unit.run.test_resume import compare, values, verdicts


def of_blend(tmp_path, **weights):
    entries = [dict(path=f"data/{name}", weight=weight) for name, weight in weights.items()]
    return values(tmp_path, data__path="", data__blend=entries)


def test_packing_is_compared_source_by_source_where_a_blend_has_them_in_both_runs(tmp_path):
    whole, cut = "isolated, longer documents cut", "concatenated"
    two, three, other = (
        of_blend(tmp_path, **{name: 1 for name in names}) for names in (("a", "b"), ("a", "b", "c"), ("a", "d"))
    )
    words = f"a {whole}; b {cut}"
    for then, now, packing, differs in (
        (two, three, (words, f"{words}; c {cut}"), False),
        (three, two, (f"{words}; c {whole}", words), False),
        (two, other, (words, whole), False),  # a and d alike, so without names
        (two, other, (words, cut), True),
        (two, three, (words, f"a {whole}; b {whole}; c {cut}"), True),
        (two, values(tmp_path), (words, cut), False),  # that switch is a difference of its own
    ):
        assert ("data.packing" in compare(then, now, packing=packing)) == differs


def test_one_folder_and_a_blend_take_turns_where_a_phase_ends(tmp_path):
    folder, blend = values(tmp_path), of_blend(tmp_path, a=1, b=3)
    for then, now in ((folder, blend), (blend, folder), (values(tmp_path, data__path="a"), of_blend(tmp_path, a=1))):
        assert verdicts(compare(then, now, 5)) == {"data.blend": True}
        (inside,) = compare(then, now, 3).values()
        assert not inside.acceptable and "documents would be read twice" in str(inside) and "phase ends" in str(inside)
    ended = copy.deepcopy(blend)
    ended["curriculum"][0] |= dict(steps=3)
    assert verdicts(compare(folder, ended)) == {"curriculum.0.steps": True, "data.blend": True}


def test_weights_of_a_phase_are_compared_as_shares(tmp_path):
    one, same, other = (of_blend(tmp_path, a=1, b=3, c=1) for _ in range(3))
    for config, weights in ((one, dict(a=1, b=2)), (same, dict(a=0.1, b=0.2, c=0)), (other, dict(a=1, b=3))):
        config["curriculum"][0]["blend_weights"] = weights
    assert compare(one, same) == {}
    assert verdicts(compare(one, other)) == {
        "curriculum.0.blend_weights.a": True, "curriculum.0.blend_weights.b": True,
    }  # fmt: skip


def test_a_source_that_only_a_finished_phase_names_may_leave_the_blend(tmp_path):
    then, now = of_blend(tmp_path, a=1, b=3, c=1), of_blend(tmp_path, a=1, b=3)
    then["curriculum"][0]["blend_weights"] = dict(c=1, a=1)
    assert verdicts(compare(then, now, 7)) == {"data.blend": True}
    assert verdicts(compare(then, now, 3)) == {
        "curriculum.0.blend_weights.a": True, "curriculum.0.blend_weights.c": True, "data.blend": True,
    }  # fmt: skip
