"""What differs between a run and the checkpoint it goes on from, and what of it may: fields by one table of rules, the
phases of the curriculum by where the run stands."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from elastic.config.load import config_dict, show
from elastic.config.training import ElasticConfig, TrainConfig
from elastic.router.phases import ElasticPhase, Phase

ABSENT = "absent"
TRAINED = "this phase has been trained"
SAMPLES = "samples of the phase would be skipped or read twice"
SCHEDULE = "rates, temperature and logit scale follow the length of the phase and jump to where they stand in it"


@dataclass(frozen=True)
class Difference:
    """A field that is not what it was. `acceptable` ones may be let through by naming the field."""

    field: str
    then: object
    now: object
    why: str
    acceptable: bool
    remedy: str = ""

    def __str__(self) -> str:
        remedy = self.remedy
        if not self.acceptable and not remedy:
            remedy = f"set it back to {show(self.then)}"
        values = f"{self.field} = {show(self.now)}, the checkpoint has {show(self.then)}"
        return f"{values}: {self.why}" + (f"; {remedy}" if remedy else "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted path; lists of sections are numbered, other lists are leaves."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def refusal(where: object, step: int, differences: Iterable[Difference]) -> str:
    """Say what keeps a run from going on: every difference, and the one setting that accepts those that can be."""
    found = list(differences)
    fixed = [difference for difference in found if not difference.acceptable]
    open_ = [difference for difference in found if difference.acceptable]
    count = "1 difference" if len(found) == 1 else f"{len(found)} differences"
    lines = [f"{where} (step {step}) is of another run, {count} from this configuration:"]
    if fixed:
        lines += ["  cannot change in a run:", *(f"    {difference}" for difference in fixed)]
    if open_:
        lines += ["  change the run from here on:", *(f"    {difference}" for difference in open_)]
        names = ",".join(dict.fromkeys(difference.field for difference in open_))
        lines.append(f"  to accept {'these' if fixed else 'them'}: 'exp_manager.accept_changes=[{names}]'")
    lines.append(
        "  to leave that run alone: choose another exp_manager.version; a new run may start from the same "
        "permuted parent"
    )
    return "\n".join(lines)


class May(StrEnum):
    """How a field may differ."""

    CHANGE = "change"  # it does not touch what is learnt, or is compared in another way
    BE_ACCEPTED = "be accepted"  # another training from here on, on the user's word
    NOT_CHANGE = "not change"  # the stored tensors, or what was done so far, would not fit


# First match wins; every field of both training configs must match one (tests/unit/run/test_resume.py). Curriculum and
# budgets are compared as what they mean, below and in resume.py.
RULES: tuple[tuple[str, May, str], ...] = (
    ("curriculum*", May.CHANGE, "compared phase by phase"),
    ("elastic.budgets*", May.CHANGE, "compared in absolute units"),
    ("elastic.router.draws_per_step", May.CHANGE, "compared as draws in each phase"),
    ("elastic.router.noise_draws_per_step", May.CHANGE, "compared as draws in each phase"),
    ("elastic.router.hidden_width", May.NOT_CHANGE, "the stored router has this width"),
    ("elastic.router.*", May.BE_ACCEPTED, "the router is trained otherwise from here on"),
    ("elastic.deployment.*", May.BE_ACCEPTED, "budgets in bytes, and all logged costs, mean something else with it"),
    ("elastic.space.keep_at_least*", May.CHANGE, "compared as the layers that every depth keeps"),
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
    raise KeyError(f"{path}: no rule of changes.py matches")


def curriculum_differences(
    then: Sequence[Phase], now: Sequence[Phase], step: int, names: tuple[Sequence[str], Sequence[str]]
) -> Iterator[Difference]:
    """Compare phase by phase at `step`: past phases are fixed, the running one in part, later ones may be accepted.

    A phase whose last step has just been made counts as running: it may still be made longer.
    `names` are the budgets then and now.
    """
    before = 0
    for index in range(max(len(then), len(now))):
        path = f"curriculum.{index}"
        if index >= len(then):
            yield Difference(path, ABSENT, now[index].name, "a phase more", True)
            continue
        num_steps, begun = then[index].num_steps, step > before
        if index >= len(now):
            yield Difference(path, then[index].name, ABSENT, TRAINED if begun else "a phase less", not begun)
            continue
        done = min(step - before, num_steps) if begun else 0
        over = step > before + num_steps
        old, new = (flatten(_meaning(phases[index], n)) for phases, n in zip((then, now), names, strict=True))
        for name in sorted(old.keys() | new.keys()):
            first, second = old.get(name, ABSENT), new.get(name, ABSENT)
            if first != second:
                yield _judged(f"{path}.{name}", name, first, second, done, over)
        before += num_steps


def _judged(path: str, name: str, then: Any, now: Any, done: int, over: bool) -> Difference:
    if over:
        return Difference(path, then, now, TRAINED, False, "leave it as it was and add a phase")
    if not done:
        return Difference(path, then, now, "the phase has not begun", True)
    if name == "steps":
        if now < done:
            return Difference(path, then, now, f"{done} steps are done", False, f"nearest legal value is {done}")
        return Difference(path, then, now, SCHEDULE, True)
    if name in ("sequence_length", "global_batch"):
        remedy = f"end the phase here with {path.rpartition('.')[0]}.steps={done} and add a phase"
        return Difference(path, then, now, SAMPLES, False, remedy)
    return Difference(path, then, now, f"holds for the rest of the phase, {done} steps of it are done", True)


def _meaning(phase: Phase, budget_names: Sequence[str]) -> dict[str, Any]:
    """Return a phase with its steps counted and its weights as shares (none: uniform), so that two ways to say one
    thing are equal."""
    phase = replace(phase, steps=phase.num_steps, tokens=None)
    if isinstance(phase, ElasticPhase):
        drawn = {name: weight for name, weight in phase.budget_weights.items() if weight}
        total, uniform = sum(drawn.values()), drawn.keys() == set(budget_names) and len(set(drawn.values())) == 1
        phase = replace(phase, budget_weights={} if uniform else {name: w / total for name, w in drawn.items()})
    return config_dict(phase)


def draw_differences(
    then: TrainConfig, now: TrainConfig, replicas_then: int, replicas_now: int, step: int
) -> Iterator[Difference]:
    """Compare how often budgets and gate noise are drawn in a step of the phases that are left."""
    if not isinstance(then, ElasticConfig) or not isinstance(now, ElasticConfig):
        return
    left = [
        (old, new)
        for old, new, end in zip(then.curriculum, now.curriculum, _ends(now.curriculum), strict=False)
        if end > step and old.global_batch == new.global_batch
    ]
    drawn = [
        ("draws_per_step", "the samples of a step are shared out to budgets otherwise", _draws, left),
        ("noise_draws_per_step", "the gates' noise falls on other samples", _noise, [p for p in left if _trains(p[1])]),
    ]
    for name, why, count, phases in drawn:
        old = [count(then, phase, replicas_then) for phase, _ in phases]
        new = [count(now, phase, replicas_now) for _, phase in phases]
        if old != new:
            values = [asdict(config.elastic.router)[name] for config in (then, now)]
            first, second = (
                f"{'null' if value is None else value} ({', '.join(map(str, counts))} in a step)"
                for value, counts in zip(values, (old, new), strict=True)
            )
            why += "; without both numbers set, it follows data.micro_batch and the number of replicas"
            yield Difference(f"elastic.router.{name}", first, second, why, True)


def _ends(phases: Sequence[Phase]) -> list[int]:
    return [sum(phase.num_steps for phase in phases[: index + 1]) for index in range(len(phases))]


def _trains(phase: ElasticPhase) -> bool:
    return not phase.router_frozen


def _draws(config: ElasticConfig, phase: Phase, replicas: int) -> int:
    return config.elastic.router.draws_per_step or phase.global_batch // config.data.micro_batch // replicas


def _noise(config: ElasticConfig, phase: Phase, replicas: int) -> int:
    return config.elastic.router.noise_draws_per_step or phase.global_batch // config.data.micro_batch
