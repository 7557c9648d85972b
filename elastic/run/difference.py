"""One difference between a run and its checkpoint, and how a list of them is told to the user."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.config.load import show

ABSENT = "absent"


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
