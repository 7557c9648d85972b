"""A router that begins at the best even cut: that of the verb evaluate, in any layout, and once a run."""

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import load_router
from elastic.router.decide import likeliest
from elastic.router.router import Router
from elastic.space.cost import Budget
from elastic.space.reach import even_cuts
from elastic.verbs.members import subnet_summary
from tests.distributed.harness import run_distributed
from tests.distributed.training import BUDGETS, CURRICULUM, ROUTER, SPACE, elastic_values, evaluate, train

# A router that stands still shows where it began.
STILL = [dict(CURRICULUM[0], steps=2, router_lr=dict(peak=0.0)), dict(CURRICULUM[1], steps=1)]
# Of few even cuts, so that a budget may lie between them.
COARSE = dict(SPACE, hidden=dict(choices=[64]), mamba_head=dict(choices=[8]), attention_head=dict(choices=[8]))


def values_of(start, version, *, space=SPACE, ways=1, budgets=BUDGETS, begin="even_cuts"):
    return elastic_values(
        start, version, curriculum=STILL, parallel=dict(tensor=ways),
        elastic=dict(space=space, budgets=budgets, router=dict(ROUTER, start=begin)),
        data=dict(path=str(start / "data"), micro_batch=2, validation_sequences=7),
    )  # fmt: skip


def _began(values):
    """Train and return the record and the likeliest subnet of every budget."""
    train(values)
    checkpoint = resolve_checkpoint(f"{values['exp_manager']['exp_dir']}/run/{values['exp_manager']['version']}")
    record = Record.read(checkpoint)
    router = Router(record.space(), len(record.family.budgets), record.family.router_width)
    load_router(checkpoint, router)
    return record, [likeliest(router, record.space(), index) for index in range(len(record.family.budgets))]


def test_a_router_begins_at_the_even_cut_that_evaluate_finds_best(start):
    ((record, began),) = run_distributed(_began, 1, values_of(start, "even"))
    half = record.family.budgets[1]
    cuts = [record.space().subnet(cut) for cut in even_cuts(record.space(), half, record.family.deployment, 32)]
    assert len(cuts) > 3 and began[0] == record.space().subnet({})
    given = [dict(name=f"c{number}", **subnet_summary(cut)) for number, cut in enumerate(cuts)]
    rows = evaluate(start, "cuts", start / "run" / "permuted", subnets=given)
    # Cuts that differ in layers they skip alone are one submodel; beyond that no tie that another order could turn.
    losses = {cut.shape(record.shape): rows[one["name"]]["loss"] for cut, one in zip(cuts, given, strict=True)}
    first, second, *_ = sorted(losses, key=losses.__getitem__)
    assert losses[second] - losses[first] > 1e-5
    assert began[1].shape(record.shape) == first


def test_on_two_ranks_it_begins_there_too(start):
    (_, alone), *_ = run_distributed(_began, 1, values_of(start, "even_alone"))
    for _, began in run_distributed(_began, 2, values_of(start, "even_split", ways=2)):
        assert began == alone


def test_a_budget_that_no_even_cut_meets_begins_as_without(start):
    budgets = [*BUDGETS, dict(name="odd", ratio=0.937, tolerance=0.001)]
    (record, began), *_ = run_distributed(_began, 1, values_of(start, "odd", space=COARSE, budgets=budgets))
    odd = record.family.budgets[2]
    assert isinstance(odd, Budget) and even_cuts(record.space(), odd, record.family.deployment, 32) == []
    (_, without), *_ = run_distributed(
        _began, 1, values_of(start, "odd_without", space=COARSE, budgets=budgets, begin="uniform")
    )
    assert began[2] == without[2]
