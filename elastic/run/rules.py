"""What may differ between a run and the checkpoint it goes on from: one table for the fields of both configs."""

from enum import StrEnum
from fnmatch import fnmatchcase


class May(StrEnum):
    """How a field may differ."""

    CHANGE = "change"  # it does not touch what is learnt, or is compared in another way
    BE_ACCEPTED = "be accepted"  # another training from here on, on the user's word
    NOT_CHANGE = "not change"  # the stored tensors, or what was done so far, would not fit


# First match wins; every field of both training configs must match one (tests/unit/test_rules.py). The
# curriculum and the budgets are compared as what they mean, in curriculum.py and resume.py.
RULES: tuple[tuple[str, May, str], ...] = (
    ("curriculum*", May.CHANGE, "compared phase by phase"),
    ("elastic.budgets*", May.CHANGE, "compared in absolute units"),
    ("elastic.router.draws_per_step", May.CHANGE, "compared as draws in each phase"),
    ("elastic.router.noise_draws_per_step", May.CHANGE, "compared as draws in each phase"),
    ("elastic.router.hidden_width", May.NOT_CHANGE, "the stored router has this width"),
    ("elastic.router.*", May.BE_ACCEPTED, "the router is trained otherwise from here on"),
    ("elastic.deployment.*", May.BE_ACCEPTED, "budgets in bytes, and all logged costs, mean something else with it"),
    ("elastic.space.*", May.NOT_CHANGE, "the stored router chooses among these widths"),
    ("model.vocab_multiple", May.CHANGE, "model.vocab is compared"),
    ("model.init_std", May.CHANGE, "weights start only once"),
    ("model.*", May.NOT_CHANGE, "the stored weights have this shape"),
    ("seed", May.NOT_CHANGE, "the order of the samples and every draw follow from it"),
    ("data.*", May.CHANGE, "the content of the folder is compared, and the draws that follow from the micro-batch"),
    ("init_from.*", May.CHANGE, "its weights are compared"),
    ("distill.num_chunks", May.CHANGE, "the same loss in other pieces"),
    ("distill.*", May.BE_ACCEPTED, "the loss is another from here on"),
    ("optim.use_distributed_optimizer", May.NOT_CHANGE, "the optimizer's state is stored in another form"),
    ("optim.overlap_grad_reduce", May.CHANGE, "the same gradients"),
    ("optim.*", May.BE_ACCEPTED, "the optimizer goes on otherwise with the moments it has gathered"),
    ("trainer.precision", May.NOT_CHANGE, "weights and optimizer state are stored in this number format"),
    ("trainer.*", May.CHANGE, "length and rhythm of this attempt"),
    ("debug.*", May.CHANGE, "it looks, and changes nothing"),
    ("parallel.*", May.CHANGE, "a checkpoint loads at every layout"),
    ("exp_manager.*", May.CHANGE, "where the run writes"),
)


def rule_of(path: str) -> tuple[May, str]:
    """Return how the field at a dotted path may differ, and why; raises KeyError for a field without a rule."""
    for pattern, may, why in RULES:
        if fnmatchcase(path, pattern):
            return may, why
    raise KeyError(f"{path}: no rule of rules.py matches")
