"""What differs between a run and the checkpoint it goes on from, and what may: fields by rules, phases by step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from elastic.blend.shares import Mix
from elastic.blend.sources import packings, run_mix
from elastic.checkpoint.record import Record
from elastic.checkpoint.state import TrainingState
from elastic.config.latency import with_digest
from elastic.config.load import config_dict, flatten, load_with_problems, show
from elastic.config.verbs import ElasticConfig, TrainConfig
from elastic.router.phases import ElasticPhase, Phase
from elastic.run.folder import RunFolderError
from elastic.space.axes import Axis

ABSENT = "absent"
REPLICAS = "replicas"  # of the first phase; what a checkpoint says of its run beside the checksums of its inputs
PACKING = "packing"  # how sequences are made of documents, in the provenance of a record; absent: concatenated
TRAINED = "this phase has been trained"


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
        remedy = self.remedy or ("" if self.acceptable else f"set it back to {show(self.then)}")
        values = f"{self.field} = {show(self.now)}, the checkpoint has {show(self.then)}"
        return f"{values}: {self.why}" + (f"; {remedy}" if remedy else "")


class ResumeError(RunFolderError):
    """A checkpoint of another run, or changes that nobody accepted."""


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
    ("data.*", May.CHANGE, "content and packing are compared, and the draws that follow from the micro-batch"),
    ("init_from.*", May.CHANGE, "its weights are compared, and what budgets start with"),
    ("distill.chunk_tokens", May.CHANGE, "the same loss in other pieces"),
    ("distill.*", May.BE_ACCEPTED, "the loss is another from here on"),
    ("optim.use_distributed_optimizer", May.NOT_CHANGE, "the optimizer's state is stored in another form"),
    ("optim.overlap_grad_reduce", May.CHANGE, "the same gradients"),
    ("optim.overlap_param_gather", May.CHANGE, "the same weights"),
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


def differences(
    state: TrainingState, saved: Record, config: TrainConfig, record: Record, origin: Mapping[str, Any]
) -> Iterator[Difference]:
    """List what differs between a checkpoint (`state`, `saved`) and the run that wants to go on from it."""
    if saved.kind != record.kind:
        yield Difference("verb", saved.kind, record.kind, "another verb wrote this checkpoint", False, "use that verb")
        return
    then, unreadable = load_with_problems(type(config), state.config)
    for problem in unreadable:
        why = f"written by another version of this project ({problem.rule})"
        yield Difference(problem.field, problem.value, ABSENT, why, False, "go on with that version")
    yield from _field_differences(then, config)
    if isinstance(then, ElasticConfig) and isinstance(config, ElasticConfig):
        names = [b.name for b in then.elastic.budgets], [b.name for b in config.elastic.budgets]
        yield from _budget_differences(saved, record, config, state.step)
        yield from _start_differences(then, config)
        yield from _curriculum_differences(then.curriculum, config.curriculum, state.step, names)
        yield from _draw_differences((then, config), (state.origin.get(REPLICAS, 1), origin[REPLICAS]), state.step)
    else:
        yield from _curriculum_differences(then.curriculum, config.curriculum, state.step, ((), ()))
    yield from _blend_differences(then, config, state.step)
    yield from _layer_differences(saved, record)
    before, now = (found.provenance.get(PACKING, "concatenated") for found in (saved, record))
    packed, packed_now = packings(before, then.data.names), packings(now, config.data.names)
    if any(packed[name] != packed_now[name] for name in packed.keys() & packed_now.keys()):
        why = "sequences are made otherwise from here on: in this epoch documents may be read twice, or not at all"
        yield Difference("data.packing", before, now, why, True)
    for name, checksum in sorted(origin["inputs"].items()):
        before = state.origin.get("inputs", {}).get(name, ABSENT if name == "init_from.family" else checksum)
        if before != checksum:
            why = "the same path holds other content, or it is another path, or new: the checksum differs"
            yield Difference(name, before[:12], checksum[:12], why, False, "give what the run started with")


def _field_differences(then: TrainConfig, now: TrainConfig) -> Iterator[Difference]:
    old, new = (flatten(with_digest(config_dict(config))) for config in (then, now))
    for path in sorted(old.keys() | new.keys()):
        first, second = old.get(path, ABSENT), new.get(path, ABSENT)
        if path == "model.pattern":  # the bars only say where a pipeline is cut
            first, second = str(first).replace("|", ""), str(second).replace("|", "")
        may, why = rule_of(path)
        if first != second and may is not May.CHANGE:
            yield Difference(path, first, second, why, may is May.BE_ACCEPTED)


def _blend_differences(then: TrainConfig, now: TrainConfig, step: int) -> Iterator[Difference]:
    """Compare the shares of the sources by name; without a blend, one folder has all, in another order."""
    if not then.data.blend and not now.data.blend:
        return
    switched = bool(then.data.blend) != bool(now.data.blend)
    old, new = (run_mix(config.data, [replace(config.curriculum[0], blend_weights={})], None).parts(0)
                for config in (then, now))  # fmt: skip
    if old == new and not switched:
        return
    first, second = (", ".join(f"{name} {float(share):.4g}" for name, share in parts.items()) for parts in (old, new))
    inside = switched and step not in accumulate(phase.num_steps for phase in now.curriculum)
    why = "the new shares hold from here on; each source goes on where it was, a new one begins"
    if switched:
        why = "holds from the next phase on, and epochs are counted from there"
    if inside:
        why = "one folder and a blend have other orders: of this phase, documents would be read twice, or not at all"
    remedy = "change between them where a phase ends (this one may end here), or start a new run" if inside else ""
    yield Difference("data.blend", first, second, why, not inside, remedy)


def _budget_differences(saved: Record, record: Record, config: ElasticConfig, step: int) -> Iterator[Difference]:
    """Compare budgets one by one, by what they ask for. A new one needs steps in which the router still learns."""
    assert saved.family is not None and record.family is not None
    then, now = ({budget.name: budget for budget in family.budgets} for family in (saved.family, record.family))
    learns = not all(phase.router_frozen for phase in config.curriculum[_num_over(config.curriculum, step) :])
    for name in dict.fromkeys((*then, *now)):
        old, new = then.get(name), now.get(name)
        if new is None:
            why = "its input to the router is dropped, and the others' share of the steps grows"
            yield Difference("elastic.budgets", str(old), ABSENT, why, True)
        elif old is None or not new.asks_as(old):
            why, remedy = "a target moves" if old else "a new budget's input to the router starts fresh", ""
            if not learns:
                why = "no step is left in which the router could learn it"
                remedy = "set it back, add a phase with router_frozen=false, or start anew"
            yield Difference("elastic.budgets", str(old or ABSENT), str(new), why, learns, remedy)
    if then.keys() == now.keys() and list(then) != list(now):
        yield Difference("elastic.budgets", ", ".join(then), ", ".join(now), "they are drawn in this order", True)


def _start_differences(then: ElasticConfig, now: ElasticConfig) -> Iterator[Difference]:
    """A budget starts with its subnet where a run begins; one that is left out has started."""
    started = {given.name: given for given in then.init_from.subnets}
    for index, given in enumerate(now.init_from.subnets):
        if given != (before := started.get(given.name)):
            why = "a budget starts with its subnet where a run begins, and this one goes on with its router as it is"
            remedy = "leave it out, or start a run of its own with init_from.family"
            old, new = (ABSENT if one is None else config_dict(one) for one in (before, given))
            yield Difference(f"init_from.subnets.{index}", old, new, why, False, remedy)


def _num_over(phases: Sequence[Phase], step: int) -> int:
    """Count the phases that end at `step` or before."""
    return sum(end <= step for end in accumulate(phase.num_steps for phase in phases))


def _curriculum_differences(
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
            if first != second and not (over and name.startswith("blend_weights.")):  # a source may leave the blend
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
        why = "rates, temperature and logit scale follow the length of the phase and jump to where they stand in it"
        return Difference(path, then, now, why, True)
    if name in ("sequence_length", "global_batch"):
        remedy = f"end the phase here with {path.rpartition('.')[0]}.steps={done} and add a phase"
        return Difference(path, then, now, "samples of the phase would be skipped or read twice", False, remedy)
    return Difference(path, then, now, f"holds for the rest of the phase, {done} steps of it are done", True)


def _meaning(phase: Phase, budget_names: Sequence[str]) -> dict[str, Any]:
    """Return a phase with its steps counted and its weights as shares (of budgets none: uniform), so that two ways to
    say one thing are equal. Without its layout: a checkpoint loads at every one."""
    blend = Mix([phase.blend_weights]).parts(0) if phase.blend_weights else {}
    shares = {name: float(share) for name, share in blend.items()}
    phase = replace(phase, steps=phase.num_steps, tokens=None, parallel=None, micro_batch=None, blend_weights=shares)
    if isinstance(phase, ElasticPhase):
        drawn = {name: weight for name, weight in phase.budget_weights.items() if weight}
        total, uniform = sum(drawn.values()), drawn.keys() == set(budget_names) and len(set(drawn.values())) == 1
        phase = replace(phase, budget_weights={} if uniform else {name: w / total for name, w in drawn.items()})
    return config_dict(phase)


def _draw_differences(configs: Sequence[ElasticConfig], replicas: Sequence[int], step: int) -> Iterator[Difference]:
    """Compare how often budgets and gate noise are drawn in a step of the phases that are left, then and now."""
    ranks = [count * c.of(c.curriculum[0]).parallel.model_size for c, count in zip(configs, replicas, strict=True)]

    def share(phase: Phase, side: int, per_replica: bool) -> int:
        own = configs[side].of(phase)
        return phase.global_batch // own.data.micro_batch // (ranks[side] // own.parallel.model_size) ** per_replica

    left = zip(*(config.curriculum[_num_over(configs[1].curriculum, step) :] for config in configs), strict=False)
    left_alike = [(old, new) for old, new in left if old.global_batch == new.global_batch]
    noisy = [(old, new) for old, new in left_alike if not new.router_frozen]
    for name, phases, per_replica, why in (
        ("draws_per_step", left_alike, True, "the samples of a step are shared out to budgets otherwise"),
        ("noise_draws_per_step", noisy, False, "the gates' noise falls on other samples"),
    ):
        values = [asdict(config.elastic.router)[name] for config in configs]
        counts = [[value or share(p[side], side, per_replica) for p in phases] for side, value in enumerate(values)]
        if counts[0] != counts[1]:
            first, second = (
                f"{'null' if value is None else value} ({', '.join(map(str, drawn))} in a step)"
                for value, drawn in zip(values, counts, strict=True)
            )
            why += "; without both numbers set, it follows data.micro_batch and the number of replicas"
            yield Difference(f"elastic.router.{name}", first, second, why, True)


def _layer_differences(saved: Record, record: Record) -> Iterator[Difference]:
    """Compare which layers each depth keeps; where only the rule has changed, what it says for these depths counts."""
    if saved.depth_ranking != record.depth_ranking:
        why = "the depth ranking of the permuted parent decides which layers a subnet keeps"
        name, remedy = "init_from.permuted_parent (depth ranking)", "give the permuted parent the run started from"
        yield Difference(name, saved.depth_ranking, record.depth_ranking, why, False, remedy)
        return
    kept, now_kept = (
        {depth: space.kept_layers(depth) for depth in space.axes[Axis.DEPTH].choices}
        for space in (saved.space(), record.space())
    )
    if kept != now_kept and kept.keys() == now_kept.keys():
        why = f"depths would keep other layers than the trained {list(kept.values())}"
        then, now = (dict(r.family.keep_at_least) if r.family else {} for r in (saved, record))
        remedy = "give what the run started with (null: no rule)"
        yield Difference("elastic.space.keep_at_least", then, now, why, False, remedy)
