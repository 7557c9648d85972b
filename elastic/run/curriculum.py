"""Differences between the curriculum of a checkpoint and the one to go on with, judged by where the run stands."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from elastic.config.load import config_dict
from elastic.config.training import ElasticConfig, TrainConfig
from elastic.router.phases import ElasticPhase, Phase
from elastic.run.difference import ABSENT, Difference, flatten

TRAINED = "this phase has been trained"
SAMPLES = "samples of the phase would be skipped or read twice"
SCHEDULE = "rates, temperature and logit scale follow the length of the phase and jump to where they stand in it"


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
